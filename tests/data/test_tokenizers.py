import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import llmq_jax as lq
from llmq_jax.data import (
    ByteTokenizer,
    FileTokenizer,
    GPT2Tokenizer,
    TextStream,
    encode_documents,
    load_tokenizer,
    long_documents,
    tokenizer_in,
)
from llmq_jax.data.gpt2_vocabulary import PUBLISHED_SHA256, packaged_vocabulary
from llmq_jax.errors import BadInput
from tests.fuzz.readers import gguf_file

TEXTS = [
    "",
    "Hello world",
    "naïve café 😀",
    "  tabs\t\n\n and 'tis I'll",
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|>b",
]


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def saved(gpt2, tmp_path_factory):
    """Folders saved by the two tokenizers of our own."""
    folder = tmp_path_factory.mktemp("saved")
    ByteTokenizer().save(folder / "bytes")
    gpt2.save(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def metaspace_folder(tmp_path_factory):
    """A SentencePiece-like tokenizer: a space before the text, which decoding drops again; adds <s> by its template."""
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf_tokenizers.decoders.Metaspace()
    trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["the cat and the dog sat on the mat\n" * 3] * 20, trainer)
    tokenizer.post_processor = hf_tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(4)  # as whoever saved it left it
    tokenizer.enable_padding(length=16)
    folder = tmp_path_factory.mktemp("metaspace")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "config.json").write_text("{}")
    return folder


def test_bytes_known_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.name) == (257, 256, "bytes")
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>"), "text is data"
    assert tokenizer.encode("a<|endoftext|>b", allow_special=True) == [97, 256, 98]
    assert tokenizer.decode([97, 256, 98]) == "a<|endoftext|>b"
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"


@given(st.text())
@settings(deadline=None)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


@given(st.lists(st.integers(0, 50256), max_size=20))
@settings(max_examples=25, deadline=None)
def test_decoding_never_fails_and_streams_alike(gpt2, saved, ids):
    for tokenizer in (ByteTokenizer(), gpt2, _loaded(saved / "bytes"), _loaded(saved / "gpt2")):
        known = [i % tokenizer.vocab_size for i in ids]
        for skip in (False, True):
            stream = TextStream(tokenizer, skip_special_tokens=skip)
            pieces = [stream.push(i) for i in known]
            assert "".join(pieces) + stream.finish() == tokenizer.decode(known, skip_special_tokens=skip)


_cache = {}


def _loaded(folder):
    return _cache.setdefault(folder, load_tokenizer(folder))


@pytest.mark.parametrize("text", ["the cat sat", "the  dog\n the mat ", "thecat 😀 the"])
def test_streaming_keeps_the_spaces_of_metaspace_tokenizers(metaspace_folder, text):
    tokenizer = load_tokenizer(metaspace_folder)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == tokenizer.decode(ids)


def test_stream_holds_back_half_a_character():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert stream.push(0xC3) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_decoding_accepts_arrays_and_drops_unknown_ids(saved, name):
    for tokenizer in (load_tokenizer(name), load_tokenizer(saved / name)):
        ids = tokenizer.encode("Hi there")
        assert tokenizer.decode(np.array(ids, np.uint16)) == "Hi there"
        assert tokenizer.decode([-1, *ids, tokenizer.vocab_size, 10**6]) == "Hi there"


def test_gpt2_known_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello<|endoftext|>", allow_special=True) == [15496, 50256]
    assert 50256 not in gpt2.encode("Hello<|endoftext|>")
    assert gpt2.decode([15496, 50256, 995], skip_special_tokens=True) == "Hello world"
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.name) == (50257, 50256, "gpt2")


def test_packaged_files_are_those_tiktoken_pins():
    import inspect

    from tiktoken_ext import openai_public

    source = inspect.getsource(openai_public.gpt2)
    assert all(digest in source for digest in PUBLISHED_SHA256.values())


def test_gpt2_from_openai_and_hugging_face_folders(gpt2, saved, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "openai").mkdir()
    for source, hf, openai in (("vocab.json", "vocab.json", "encoder.json"), ("merges.txt", "merges.txt", "vocab.bpe")):
        shutil.copy(saved / "gpt2" / source, tmp_path / "hf" / hf)
        shutil.copy(saved / "gpt2" / source, tmp_path / "openai" / openai)
    (tmp_path / "hf" / "added_tokens.json").write_text('{"<|pad|>": 50257}')
    for folder in ("hf", "openai"):
        loaded = load_tokenizer(tmp_path / folder)
        assert isinstance(loaded, GPT2Tokenizer)
        for text in TEXTS:
            assert loaded.encode(text) == gpt2.encode(text)
            assert loaded.encode(text, allow_special=True) == gpt2.encode(text, allow_special=True)
    hf = load_tokenizer(tmp_path / "hf")
    assert (hf.vocab_size, hf.encode("<|pad|>", allow_special=True)) == (50258, [50257])
    hf.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode("x<|pad|>", allow_special=True) == [87, 50257]


def test_written_files_equal_the_published(gpt2, saved):
    vocabulary = packaged_vocabulary()
    assert json.loads((saved / "gpt2" / "vocab.json").read_text("utf-8")) == vocabulary.ids
    assert len((saved / "gpt2" / "merges.txt").read_text("utf-8").splitlines()) == len(vocabulary.merges) + 1 == 50001


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_saved_tokenizer_loads_with_equal_ids(saved, name):
    original, loaded = load_tokenizer(name), FileTokenizer(saved / name)
    assert (loaded.vocab_size, loaded.end_of_text) == (original.vocab_size, original.end_of_text)
    for text in TEXTS:
        for allow_special in (False, True):
            ids = original.encode(text, allow_special=allow_special)
            assert loaded.encode(text, allow_special=allow_special) == ids
            assert loaded.decode(ids) == text
    assert loaded.decode([loaded.end_of_text], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_our_own_files_are_known_again(saved, name, tmp_path):
    for path in (saved / name, saved / name / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (type(loaded), loaded.name) == (type(load_tokenizer(name)), name)
    changed = Path(shutil.copytree(saved / name, tmp_path / "changed"))
    (changed / "tokenizer_config.json").write_text((changed / "tokenizer_config.json").read_text() + " ")
    loaded = load_tokenizer(changed)
    assert (type(loaded), loaded.name) == (FileTokenizer, "changed"), "it would not be written back unchanged"


def test_file_tokenizer_adds_and_cuts_nothing_unasked(metaspace_folder):
    tokenizer = load_tokenizer(metaspace_folder)
    text = "the cat and the dog sat on the mat"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, "the file's own truncation to 4 and padding to 16 must be off"
    assert tokenizer.encode(text, add_special_tokens=True) == [1, *ids, 2]
    assert tokenizer.beginning == (1,) and tokenizer.encode_prompt(text) == [1, *ids]
    assert tokenizer.encode_prompt("") == [1] and ByteTokenizer().encode_prompt("") == [256]
    assert tokenizer.end_of_text == 2, "eos_token written as an object"
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.encode("</s>", allow_special=True) == [2]


def test_file_tokenizer_writes_its_files_back_unchanged(metaspace_folder, tmp_path):
    load_tokenizer(metaspace_folder / "tokenizer.json").save(tmp_path / "copy")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (metaspace_folder / name).read_bytes()


@pytest.mark.parametrize("which", ["bytes", "gpt2", "metaspace"])
def test_a_chat_template_in_place_of_a_tokenizers_own(metaspace_folder, tmp_path, which):
    """It alone is in the files, and transformers' tokens by it are ours."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(metaspace_folder if which == "metaspace" else which)
    if which == "metaspace":  # with one in every place
        config = {"eos_token": "</s>", "chat_template": [{"name": "tool_use", "template": "no"}]}
        others = {"tokenizer_config.json": config, "chat_template.json": {"chat_template": "no"}}
        files = tokenizer.files() | {name: json.dumps(values).encode() for name, values in others.items()}
        tokenizer = FileTokenizer.from_files(files, "chats")
    template = "{% for m in messages %}\n {{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}\n"
    changed = tokenizer.with_chat_template(template)
    assert (changed.name, changed.vocab_size, changed.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert changed.chat_template.source == template
    assert tokenizer.chat_template is None or tokenizer.chat_template.source != template, "the first stays as it is"
    changed.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "chat_template.json").exists()
    assert "tool_use" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    again, theirs = load_tokenizer(tmp_path / "saved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.files() == changed.files() and theirs.chat_template == template
    messages = [{"role": "user", "content": "the cat 😀"}, {"role": "assistant", "content": "sat on\nthe mat"}]
    expected = theirs.apply_chat_template(messages, chat_template=template, return_dict=False)
    text = changed.chat_template.render(messages, add_generation_prompt=False)
    assert changed.encode(text, allow_special=True) == again.encode(text, allow_special=True) == expected
    assert expected.count(changed.end_of_text) == 2


@pytest.mark.parametrize("which", ["bytes", "gpt2", "saved bytes", "saved gpt2", "metaspace"])
def test_encode_documents(monkeypatch, saved, metaspace_folder, which):
    """Blocks, cut documents and threads leave exactly the tokens of each document alone."""
    monkeypatch.setattr(long_documents, "BLOCK_CHARACTERS", 64)  # cuts documents into pieces of 4 characters
    name = metaspace_folder if which == "metaspace" else saved / which[6:] if which.startswith("saved") else which
    tokenizer = load_tokenizer(name)
    documents = [*TEXTS, "one\ntwo\n\nthree \n four\n\tfive\r\nsix!\r\n\n" * 9, "x\n" * 50]
    tokens = encode_documents(tokenizer, (document for document in documents))
    start, end = tokenizer.beginning, tokenizer.end_of_text
    expected = [i for document in documents for i in [*start, *tokenizer.encode(document), end]]
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == expected
    joined = encode_documents(tokenizer, documents, append_end_of_text=False)
    assert joined.tolist() == [i for document in documents for i in [*start, *tokenizer.encode(document)]]
    assert encode_documents(tokenizer, []).shape == (0,)


def test_cores_share_a_long_document(monkeypatch):
    monkeypatch.setattr(long_documents, "BLOCK_CHARACTERS", 64)
    read: list[str] = []

    class Recording(tiktoken.Encoding):
        def encode_to_numpy(self, text, **options):
            read.append(text)
            return super().encode_to_numpy(text, **options)

    monkeypatch.setattr(tiktoken, "Encoding", Recording)
    tokenizer = load_tokenizer("gpt2")
    (ids,) = tokenizer.encode_arrays(["one\ntwo\nthree\n"])
    assert sorted(read) == ["\n", "\nthree", "one\ntwo"]
    assert ids.dtype == np.uint16 and ids.tolist() == tokenizer.encode("one\ntwo\nthree\n")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_type_of_ids_holds_the_largest(vocab_size, dtype):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    assert tokenizer.dtype == dtype


def test_a_token_that_begins_and_ends_texts_stands_once_between_them():
    class Beginning(ByteTokenizer):
        beginning = (256,)

    assert encode_documents(Beginning(), ["a", "b"]).tolist() == [256, 97, 256, 98, 256]
    assert encode_documents(Beginning(), ["a", "b"], append_end_of_text=False).tolist() == [256, 97, 256, 98]


def test_one_text_in_place_of_documents_is_refused():
    with pytest.raises(BadInput, match=r"documents must be a list of texts, not one text: write \[text\]"):
        encode_documents(ByteTokenizer(), "ab")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "my.txt").write_text("First Citizen:")
    with pytest.raises(BadInput, match=r": my\.txt cannot be read"):
        load_tokenizer(tmp_path / "my.txt")


def test_encode_documents_needs_an_end_of_text_token(tmp_path):
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match=r"no end-of-text token.*: name one as eos_token in tokenizer_config\.json"):
        encode_documents(load_tokenizer(tmp_path), ["a"])
    assert encode_documents(load_tokenizer(tmp_path), ["a"], append_end_of_text=False).tolist() == [0]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "saved"])
def test_half_a_surrogate_pair_is_refused(saved, name):
    tokenizer = load_tokenizer(saved / "bytes" if name == "saved" else name)
    for encode in (tokenizer.encode, lambda text: encode_documents(tokenizer, [text])):
        with pytest.raises(BadInput, match="surrogate pair at character 2"):
            encode("ab\ud800")


def test_bad_tokenizers(tmp_path):
    for name, words in (("gpt3", "none of these"), (str(tmp_path), "folder without")):
        with pytest.raises(BadInput, match=words) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
    assert tokenizer_in(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"SentencePiece's")  # which only transformers reads
    way_out = r"is not read: have transformers write a tokenizer\.json \(AutoTokenizer"
    with pytest.warns(UserWarning, match=f"{tmp_path}: is loaded without a tokenizer, since tokenizer.model {way_out}"):
        assert tokenizer_in(tmp_path) is None
    with pytest.raises(BadInput, match=f"a folder with tokenizer.model, which {way_out}"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(BadInput, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_named_by_whatever_model_holds_it(saved, tmp_path):
    """By a saved model or a run, one of its checkpoints, a GGUF file or its folder."""
    config = lq.GPT2Config(257, 8, 4, 1, 1)
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config), load_tokenizer(saved / "bytes"))
    run = lq.save(lm, tmp_path / "run")
    for path in (run, run / "checkpoints", next((run / "checkpoints").iterdir())):
        assert load_tokenizer(path).files() == lm.tokenizer.files()
    folder = tmp_path / "gguf"
    folder.mkdir()
    gguf_file(folder)
    for path in (folder, folder / "model.gguf"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.name == "model" and tokenizer.encode("ab") == lq.load(path).tokenizer.encode("ab")
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"model\.gguf: not a GGUF file, or truncated"):
        load_tokenizer(folder / "model.gguf")


def test_eos_token_that_is_not_in_the_vocabulary(saved, tmp_path):
    shutil.copy(saved / "bytes" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(BadInput, match="names the eos_token '</s>'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids, merges: ids.pop("a"), "lacks 1 of the 256 single bytes"),
        (lambda ids, merges: merges.append("a zzz"), "which vocab.json does not hold"),
        (lambda ids, merges: merges.append("h e"), "lower id than the merge before it"),
        (lambda ids, merges: merges.append("h e llo"), "line 4 holds 3 tokens"),
        (lambda ids, merges: ids.update(b="no id"), "token: id"),
    ],
)
def test_bad_gpt2_files(tmp_path, change, words):
    from llmq_jax.data.gpt2_vocabulary import byte_characters

    ids = {character: i for i, character in enumerate(byte_characters())} | {"he": 256, "ll": 257}
    merges = ["#version: 0.2", "h e", "l l"]
    change(ids, merges)
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    with pytest.raises(BadInput, match=words):
        load_tokenizer(tmp_path)


def test_a_tokenizer_shows_its_name_and_size(tmp_path):
    (tmp_path / "mine").mkdir()
    hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel({"a": 0, "b": 1500})).save(
        str(tmp_path / "mine" / "tokenizer.json")
    )
    assert repr(FileTokenizer(tmp_path / "mine")) == "FileTokenizer(mine, 1,501 ids)"
    assert repr(ByteTokenizer()) == "ByteTokenizer(bytes, 257 ids)"
