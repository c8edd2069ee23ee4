"""Tokens on disk: the runs that they give are those of the text itself."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llmq_jax.data import (
    ByteTokenizer,
    encode_documents,
    load_tokenizer,
    read_tokens,
    split_documents,
    split_tokens,
    write_tokens,
)
from llmq_jax.errors import BadInput

DOCUMENTS = [f"document {number} " + "abba ab" * (5 + number % 7) for number in range(40)]


@pytest.fixture
def prepare(pretrain, program):
    """`prepare(*options)` -> (exit code, stdout, stderr), in the folder that `pretrain` works in."""
    Path("rows.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    Path("one.txt").write_text("\n".join(DOCUMENTS))
    return partial(program, "train.prepare")


def losses(folder):
    records = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [(record.get("loss"), record.get("validation_loss")) for record in records if "done" not in record]


QUIET = ("--sample-every", 0, "--evaluate-every", 3)


def test_a_run_is_the_same_from_text_and_from_tokens(prepare, pretrain):
    code, out, err = prepare("--data", "rows.jsonl", "--tokenizer", "bytes", "--out", "tokens")
    assert (code, err) == (0, "") and "python -m train.pretrain --data tokens --out" in out
    for data in ("rows.jsonl", "tokens"):
        assert pretrain("--data", data, "--out", f"run-{data}", *QUIET, "--separate-documents")[0] == 0
    assert losses("run-tokens") == losses("run-rows.jsonl") and len(losses("run-tokens")) >= 6
    configs = [json.loads(Path(f"run-{data}/config.json").read_text()) for data in ("rows.jsonl", "tokens")]
    for name in ("tokenizer", "training_tokens", "validation_tokens", "training_sha256", "validation_sha256"):
        assert configs[0][name] == configs[1][name]
    # One that began with the text is known again.
    code, out, err = pretrain("--data", "tokens", "--out", "run-rows.jsonl", *QUIET, "--separate-documents")
    assert (code, err) == (0, "") and "is finished already" in out


def test_a_run_goes_on_with_the_tokens_of_a_text_that_was_split_and_read_otherwise(prepare, pretrain):
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace('"text"', '"body"'))
    made = ("--data", "rows.jsonl", "--text-field", "body", "--validation-fraction", 0.25)
    assert pretrain(*made, "--out", "run", *QUIET)[0] == 0
    assert prepare(*made, "--tokenizer", "bytes", "--out", "tokens")[0] == 0
    code, out, err = pretrain("--data", "tokens", "--out", "run", *QUIET)
    assert (code, err) == (0, "") and "is finished already" in out
    assert prepare(*made[:-1], 0.5, "--tokenizer", "bytes", "--out", "others")[0] == 0
    code, _, err = pretrain("--data", "others", "--out", "run", *QUIET)
    assert code == 2 and "training_sha256" in err and err.count("\n") == 1


def test_streams(prepare):
    tokenizer = ByteTokenizer()
    training, held_out = (encode_documents(tokenizer, part) for part in split_documents(DOCUMENTS, 0.25))
    options = ("--data", "rows.jsonl", "--tokenizer", "bytes")
    assert prepare(*options, "--validation-fraction", 0.25, "--out", "some")[0] == 0
    tokens = read_tokens("some")
    np.testing.assert_array_equal(tokens.training, training)
    np.testing.assert_array_equal(tokens.validation, held_out)
    assert tokens.training.dtype == np.uint16 and tokens.facts.separated and tokens.largest_id == 256
    assert isinstance(tokens.training, np.memmap)

    assert prepare(*options, "--validation-fraction", 0, "--out", "all")[0] == 0
    assert read_tokens("all").validation is None
    np.testing.assert_array_equal(read_tokens("all").training, encode_documents(tokenizer, DOCUMENTS))

    assert prepare("--data", "one.txt", "--tokenizer", "bytes", "--out", "one")[0] == 0
    whole = encode_documents(tokenizer, ["\n".join(DOCUMENTS)], append_end_of_text=False)
    for name, part in zip(("training", "validation"), split_tokens(whole, 0.1), strict=True):
        np.testing.assert_array_equal(getattr(read_tokens("one"), name), part)
    assert not read_tokens("one").facts.separated

    assert prepare(*options, "--validation-data", "one.txt", "--out", "two")[0] == 0
    np.testing.assert_array_equal(read_tokens("two").validation, whole)


def test_many_pieces_are_one_stream(monkeypatch, tmp_path):
    monkeypatch.setattr("llmq_jax.data.long_documents.BLOCK_CHARACTERS", 100)
    from llmq_jax.data import encoded_blocks

    tokenizer = ByteTokenizer()
    pieces = list(encoded_blocks(tokenizer, DOCUMENTS))
    assert len(pieces) > 10
    made = write_tokens(tmp_path / "t", tokenizer, pieces, None, separated=True, sample=DOCUMENTS[0])
    expected = b"".join(document.encode("utf-16-le")[: 2 * len(document)] + b"\x00\x01" for document in DOCUMENTS)
    assert made.training.tobytes() == expected  # bytes are their own ids, and 256 ends a document


def test_tokens_without_a_held_out_part(prepare, pretrain):
    _, out, _ = prepare("--data", "rows.jsonl", "--tokenizer", "bytes", "--validation-fraction", 0, "--out", "all")
    assert "train.pretrain --data all --out runs/mine --evaluate-every 0\n" in out
    assert pretrain("--data", "all", "--out", "a", "--sample-every", 0, "--evaluate-every", 0)[0] == 0
    code, out, err = pretrain("--data", "all", "--out", "b", *QUIET, "--validation-data", "one.txt")
    assert (code, err) == (0, "") and f"{len(Path('one.txt').read_bytes()):,} held out" in out
    code, _, err = pretrain("--data", "all", "--out", "c")
    assert code == 2 and err == "error: all has no tokens held out; give --validation-data, or --evaluate-every 0\n"


def test_a_model_goes_on_with_tokens_of_its_own_tokenizer(prepare, pretrain, pretrained):
    start = ("--init-from", pretrained / "run", "--out", "run", *QUIET)
    tiny = ["--batch-size=4", "--steps=3"]
    for name in ("bytes", "gpt2"):
        assert prepare("--data", "rows.jsonl", "--tokenizer", name, "--out", name)[0] == 0
    code, _, err = pretrain("--data", "gpt2", *start, tiny=tiny)
    assert code == 2 and err.count("\n") == 1
    assert "gpt2 holds tokens of the tokenizer gpt2, and bytes makes others of the same text" in err
    assert pretrain("--data", "bytes", *start, tiny=tiny)[0] == 0


def nanogpt_folder(name, training, validation=None):
    """What nanoGPT's prepare.py writes, the files of its own and the text among them."""
    folder = Path(name)
    folder.mkdir()
    (folder / "input.txt").write_text("text")
    for file, ids in (("train.bin", training), ("val.bin", validation)):
        if ids is not None:
            np.array(ids, np.uint16).tofile(folder / file)


def test_tokens_of_nanogpt(prepare, pretrain, monkeypatch):
    monkeypatch.setattr("llmq_jax.data.nanogpt_tokens.PIECE", 100)
    tokenizer = load_tokenizer("gpt2")
    training, held_out = (encode_documents(tokenizer, part).tolist() for part in split_documents(DOCUMENTS, 0.25))
    nanogpt_folder("owt", training, held_out)
    code, out, err = prepare("--data", "owt", "--tokenizer", "gpt2", "--out", "tokens")
    assert (code, err) == (0, "") and f"{len(training):,} tokens to learn, {len(held_out):,} held out" in out
    tokens = read_tokens("tokens")
    assert tokens.training.tolist() == training and tokens.validation.tolist() == held_out
    assert tokens.facts.separated and tokens.largest_id == 50256
    assert pretrain("--data", "tokens", "--out", "run", *QUIET, "--separate-documents")[0] == 0
    code, _, err = pretrain("--data", "owt", "--out", "other", *QUIET)
    assert code == 2 and "owt holds nanoGPT's tokens where text is read" in err and err.count("\n") == 1

    one = tokenizer.encode("\n".join(DOCUMENTS))
    nanogpt_folder("shakespeare", one)
    assert prepare("--data", "shakespeare", "--tokenizer", "gpt2", "--out", "one")[0] == 0
    assert not read_tokens("one").facts.separated
    for name, part in zip(("training", "validation"), split_tokens(np.array(one), 0.1), strict=True):
        np.testing.assert_array_equal(getattr(read_tokens("one"), name), part)
    options = ("--data", "shakespeare", "--tokenizer", "gpt2", "--validation-fraction", 0, "--out", "all")
    assert prepare(*options)[0] == 0
    assert read_tokens("all").training.tolist() == one and read_tokens("all").validation is None


TEXT = list(b"plain text, of which all bytes are tokens")
BAD_NANOGPT = {
    "tokenizer": (["--tokenizer", "gpt2"], TEXT, "train.bin does not begin with tokens as gpt2 makes them"),
    "vocabulary": ([], [300, 1], "train.bin does not begin with tokens as bytes makes them"),
    "the second token": ([], [*b"a", 255, *b"bc"], "train.bin does not begin with tokens as bytes makes them"),
    "a late id": ([], [*TEXT * 50, 300], "the token id 300 is none of bytes's"),
    "fraction": (["--validation-fraction", 0.5], TEXT, "--validation-fraction has no effect beside made/val.bin"),
    "text": (["--validation-data", "one.txt"], TEXT, "--validation-data has no effect on nanoGPT's train.bin"),
    "empty": ([], [], "train.bin has 0 bytes"),
}


@pytest.mark.parametrize("case", BAD_NANOGPT)
def test_bad_tokens_of_nanogpt(prepare, case):
    options, training, message = BAD_NANOGPT[case]
    nanogpt_folder("made", training, TEXT)
    tokenizer = [] if "--tokenizer" in options else ["--tokenizer", "bytes"]
    code, _, err = prepare("--data", "made", "--out", "new", *tokenizer, *options)
    assert code == 2 and err.count("\n") == 1 and message in err, err
    assert not Path("new").exists()


def test_characters_of_nanogpt_are_refused(prepare):
    nanogpt_folder("made", TEXT)
    Path("made/meta.pkl").write_bytes(b"")
    code, _, err = prepare("--data", "made", "--tokenizer", "bytes", "--out", "new")
    assert code == 2 and err == "error: made holds tokens of characters (by its meta.pkl); prepare the text itself\n"


BAD = {
    "folder there": (["--data", "rows.jsonl", "--out", "full"], "full exists already, and tokens go into a new folder"),
    "no data": (["--data", "nowhere", "--out", "new"], "there is no file or folder nowhere"),
    "no field": (["--data", "rows.jsonl", "--text-field", "body", "--out", "new"], "'body'"),
    "broken in the middle": (["--data", "broken.jsonl", "--out", "new"], "broken.jsonl"),
    "field of plain text": (["--data", "one.txt", "--text-field", "a", "--out", "new"], "--text-field has no effect"),
    "fraction": (["--data", "rows.jsonl", "--validation-fraction", 1, "--out", "new"], "must lie between 0 and 1"),
    "two validations": (
        ["--data", "rows.jsonl", "--validation-data", "one.txt", "--validation-fraction", 0.5, "--out", "new"],
        "--validation-fraction has no effect beside --validation-data",
    ),
    "tokens again": (["--data", "made", "--out", "new"], "made holds tokens where text is read"),
    "blank": (["--data", "blank.txt", "--out", "new"], "blank.txt holds no text"),
    "nothing but what is held out": (["--data", "half.jsonl", "--out", "new"], "half.jsonl holds no text to learn"),
}
READ = ("no data", "no field", "broken in the middle", "blank", "nothing but what is held out")
"""What only reading tells."""


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(prepare, case):
    Path("full").mkdir()
    Path("blank.txt").write_text(" \n ")
    Path("half.jsonl").write_text('{"text": "  "}\n{"text": "hello"}\n')
    Path("broken.jsonl").write_text(Path("rows.jsonl").read_text() + "{'text'")
    prepare("--data", "one.txt", "--tokenizer", "bytes", "--out", "made")
    before = sorted(Path().rglob("*"))
    options, message = BAD[case]
    code, out, err = prepare(*options, "--tokenizer", "bytes")
    assert code == 2 and err.count("\n") == 1 and message in err, err
    assert out == "" or case in READ
    assert sorted(Path().rglob("*")) == before


def test_ids_that_do_not_fit_are_refused(tmp_path):
    for ids in ([1, 2**16], [-1]):
        with pytest.raises(BadInput, match=f"token ids from {min(ids)} to {max(ids)} do not fit uint16"):
            write_tokens(tmp_path / "t", ByteTokenizer(), [np.array(ids)], None, separated=False, sample="a")
    assert not list(tmp_path.iterdir())
    greatest = [np.array([2**16 - 1])]
    written = write_tokens(tmp_path / "t", ByteTokenizer(), greatest, None, separated=False, sample="a")
    assert written.training.tolist() == [2**16 - 1]


def test_of_two_that_write_one_folder_the_first_wins(tmp_path):
    def write(pieces):
        return write_tokens(tmp_path / "t", ByteTokenizer(), pieces, None, separated=False, sample="a")

    def while_another_writes():
        yield np.arange(3, dtype=np.uint16)
        write([np.array(ids, np.uint16) for ids in ([3, 4], [0, 1, 2])])

    with pytest.raises(BadInput, match="exists already"):
        write(while_another_writes())
    found = read_tokens(tmp_path / "t")
    assert (found.training.tolist(), found.largest_id) == ([3, 4, 0, 1, 2], 4)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_stream_that_has_grown_is_refused(tmp_path):
    parts = [np.arange(5)], [np.arange(7)]
    assert write_tokens(tmp_path / "t", ByteTokenizer(), *parts, separated=False, sample="a").largest_id == 6
    with (tmp_path / "t" / "training.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(BadInput, match=r"training\.bin has 12 bytes, not the 10 of 5 tokens"):
        read_tokens(tmp_path / "t")


def test_a_full_disk_is_told_with_the_file(prepare, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmq_jax.data.token_files.os.fsync", full)
    code, _, err = prepare("--data", "one.txt", "--tokenizer", "bytes", "--out", "new")
    assert code == 2 and err.count("\n") == 1 and "training.bin" in err and "No space left on device" in err
    assert not Path("new").exists()


def test_a_folder_of_text_may_hold_a_file_of_that_name(prepare, pretrain):
    Path("corpus").mkdir()
    Path("corpus/tokens.json").write_text(json.dumps(DOCUMENTS))
    assert pretrain("--data", "corpus", "--out", "run", *QUIET)[0] == 0


def test_what_stops_half_way_leaves_nothing(tmp_path):
    def pieces():
        yield np.zeros(3, np.uint16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "t", ByteTokenizer(), pieces(), None, separated=False, sample="a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "training.bin").write_bytes(b"1234"),
            "made/training.bin has 4 bytes, not the",
        ),
        (lambda folder: (folder / "validation.bin").unlink(), "made cannot be read as tokens (FileNotFound"),
        (
            lambda folder: (folder / "tokens.json").write_text("{}"),
            "made cannot be read as tokens (KeyError('version')",
        ),
        (
            lambda folder: (folder / "tokens.json").write_text('{"version": 9}'),
            "made/tokens.json is of version 9",
        ),
        (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "made/tokenizer holds no tokenizer"),
    ],
)
def test_spoiled_folders(prepare, pretrain, spoil, message):
    prepare("--data", "rows.jsonl", "--tokenizer", "bytes", "--out", "made")
    spoil(Path("made"))
    code, _, err = pretrain("--data", "made", "--out", "run")
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"error: {message}"), err
    assert not Path("run").exists()


def test_options_without_effect_on_tokens(prepare, pretrain):
    prepare("--data", "rows.jsonl", "--tokenizer", "bytes", "--out", "made")
    for options, message in (
        (("--text-field", "body"), "--text-field has no effect on data without fields"),
        (("--validation-fraction", 0.2), "--validation-fraction has no effect on prepared tokens"),
        (("--validation-data", "one.txt"), "made has tokens held out already; leave --validation-data out"),
        (("--tokenizer", "gpt2"), "made holds tokens of the tokenizer bytes, and gpt2 makes others"),
    ):
        code, _, err = pretrain("--data", "made", "--out", "run", *options)
        assert code == 2 and err.count("\n") == 1 and message in err, err


def test_a_folder_with_splits(prepare, pretrain):
    """Its tokens, and the run on them, are those of its files; what is for the test is nowhere."""
    parts = {"train/a": DOCUMENTS[:20], "train/b": DOCUMENTS[20:30], "val": DOCUMENTS[30:35], "test": DOCUMENTS[35:]}
    for name, part in parts.items():
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("data", f"{name}.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in part))
    code, out, err = prepare("--data", "data", "--tokenizer", "bytes", "--out", "tokens")
    line = "data: train/a.jsonl and 1 more to learn, val.jsonl held out, test.jsonl left out\n"
    assert (code, err) == (0, "") and line in out and "documents to learn: 30)" in out
    tokens, tokenizer = read_tokens("tokens"), ByteTokenizer()
    np.testing.assert_array_equal(tokens.training, encode_documents(tokenizer, DOCUMENTS[:30]))
    np.testing.assert_array_equal(tokens.validation, encode_documents(tokenizer, DOCUMENTS[30:35]))
    # To hold out nothing leaves them out.
    options = ("--tokenizer", "bytes", "--validation-fraction")
    code, out, err = prepare("--data", "data", *options, 0, "--out", "all")
    assert (code, err) == (0, "") and "val.jsonl left out, test.jsonl left out\n" in out
    np.testing.assert_array_equal(read_tokens("all").training, tokens.training)
    assert read_tokens("all").validation is None
    code, _, err = prepare("--data", "data", *options, 0.1, "--out", "some")
    assert code == 2 and "--validation-fraction has no effect beside the validation files of data, val.jsonl" in err

    code, out, err = pretrain("--data", "data", "--out", "run", *QUIET)
    assert (code, err) == (0, "") and line in out
    moved = ("--data", "data/train", "--validation-data", "data/val.jsonl")
    for given in (("--data", "tokens"), moved):
        assert "run is finished already" in pretrain(*given, "--out", "run", *QUIET)[1]
    # Beside tokens without a held-out part a folder's validation files are held out.
    code, out, err = pretrain("--data", "all", "--validation-data", "data", "--out", "run", *QUIET)
    assert (code, err) == (0, "") and "val.jsonl held out, test.jsonl left out\n" in out and "finished already" in out
    code, out, err = pretrain("--data", "data", "--out", "blind", "--sample-every", 0, "--evaluate-every", 0)
    assert (code, err) == (0, "") and f"{len(tokens.training):,} tokens to learn, 0 held out" in out
