import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmq_jax as lq
from llmq_jax.data import length_buckets
from llmq_jax.language_model import with_classifier
from llmq_jax.training.classification_report import probabilities

LABELS = ("ham", "spam", "eggs")
TEXTS = ["You have won", "See you at noon, then", "ok"]


@pytest.fixture(scope="module")
def classifier(tiny_model):
    lm = with_classifier(tiny_model, LABELS, seed=1)
    kernel = 20 * lm.params["score"]["kernel"]  # far from even
    return lm.replace(variables={**lm.variables, "params": {**lm.params, "score": {"kernel": kernel}}})


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    return lq.save_hf(classifier, tmp_path_factory.mktemp("classifier") / "saved")


def expected(classifier, text):
    return dict(zip(LABELS, probabilities(np.asarray(classifier.classify([text])))[0].tolist(), strict=True))


def test_texts(llmq, classifier, folder, piped):
    piped(f"{TEXTS[0]}\n")
    options = [option for text in ("-", *TEXTS[1:]) for option in ("--text", text)]
    code, out, err = llmq("classify", folder, *options)
    assert (code, err) == (0, "")
    for line, text in zip(out.splitlines(), TEXTS, strict=True):
        chances = sorted(expected(classifier, text).items(), key=lambda pair: -pair[1])
        assert line == "  ".join([*(f"{label} {chance:.4f}" for label, chance in chances), text])


def test_json(llmq, classifier, folder):
    _, out, _ = llmq("classify", folder, "--text", TEXTS[0], "--json")
    row = json.loads(out)
    chances = expected(classifier, TEXTS[0])
    assert row["text"] == TEXTS[0] and row["label"] == max(chances, key=chances.get)
    assert row["probabilities"] == pytest.approx(chances, abs=1e-5) and sum(
        row["probabilities"].values()
    ) == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_file(llmq, classifier, folder, batch_size, tmp_path):
    data, output = tmp_path / "texts.csv", tmp_path / "out.jsonl"
    data.write_text("id,message\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)))
    options = ("--data", data, "--text-field", "message", "--out", output, "--batch-size", batch_size)
    code, out, err = llmq("classify", folder, *options)
    assert (code, err) == (0, "") and f"written: {output}, 3 texts: " in out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["message"]) for row in rows] == list(zip("012", TEXTS, strict=True))
    for row in rows:
        assert list(row) == ["id", "message", "label", "probabilities"]
        assert row["probabilities"] == pytest.approx(expected(classifier, row["message"]), abs=1e-5)
    code, _, err = llmq("classify", folder, *options)
    assert code == 2 and f"--out {output} is there already; name a new file" in err


def test_labels_that_the_data_have_come_out_beside_the_prediction(llmq, classifier, folder, tmp_path):
    names = [max(chances := expected(classifier, text), key=chances.get) for text in TEXTS]
    data, output = tmp_path / "labelled.jsonl", tmp_path / "out.jsonl"
    given = [names[0], "other", names[2]]
    lines = [json.dumps({"label": label, "text": text}) for label, text in zip(given, TEXTS, strict=True)]
    data.write_text("\n".join([*lines, '{"text": "b"}']))
    code, out, err = llmq("classify", folder, "--data", data, "--out", output)
    assert (code, err) == (0, "") and out.endswith("; 2 of 3 as labelled\n")
    *rows, other = map(json.loads, output.read_text().splitlines())
    assert list(other) == ["text", "label", "probabilities"]
    assert [(row["given_label"], row["text"], row["label"]) for row in rows] == list(
        zip(given, TEXTS, names, strict=True)
    )
    assert llmq("classify", folder, "--data", data, "--json")[1] == output.read_text()


@pytest.mark.parametrize("kind", ["tsv", "headless.tsv", "jsonl", "json", "parquet", "txt"])
def test_kinds_of_files(llmq, classifier, folder, kind, tmp_path):
    """Whatever stands beside the text comes back with it."""
    data = tmp_path / f"texts.{kind}"
    records = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    options, texts = (), TEXTS
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), data)
    elif kind == "txt":
        data.write_text(TEXTS[0])
        records, texts = [{"text": TEXTS[0]}], TEXTS[:1]
    elif kind == "jsonl":
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "json":
        records[1] = {"text": TEXTS[1]}
        data.write_text(json.dumps([records[0], TEXTS[1], records[2]]))  # a string is a text
    else:
        header = "id\ttext\n" if kind == "tsv" else ""
        options = () if header else ("--columns", "id, text")
        data.write_text(header + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)))
        records = [{**record, "id": str(record["id"])} for record in records]
    code, out, err = llmq("classify", folder, "--data", data, "--json", *options)
    assert (code, err) == (0, "")
    for line, record, text in zip(out.splitlines(), records, texts, strict=True):
        chances = expected(classifier, text)
        said = {"label": max(chances, key=chances.get), "probabilities": pytest.approx(chances, abs=1e-5)}
        assert json.loads(line) == {**record, **said}


def test_a_folder_s_records_come_out_again(llmq, folder, tmp_path, monkeypatch):
    """Those of its files of records with all fields, its text files as one text each; faults name file and row."""
    (data := tmp_path / "data").mkdir()
    (data / "a.jsonl").write_text('{"id": 1, "text": "x"}\n"y"\n')
    (data / "b.csv").write_text("id,text\n7,z\n")
    (data / "c.txt").write_text("w")
    code, out, _ = llmq("classify", folder, "--data", data, "--json")
    found = [{name: row[name] for name in row if name in ("id", "text")} for row in map(json.loads, out.splitlines())]
    assert (code, found) == (0, [{"id": 1, "text": "x"}, {"text": "y"}, {"id": "7", "text": "z"}, {"text": "w"}])
    (data / "b.csv").write_text("id,text\n7,z\n8, \n")
    assert f"{data / 'b.csv'}: line 3: field 'text' holds no text" in llmq("classify", folder, "--data", data)[2]


@pytest.fixture
def stopped(llmq, folder, tmp_path, monkeypatch, stopped_at):
    """(the command, what it writes without a stop, the file with the two lines of five that it came to)."""
    monkeypatch.setattr(length_buckets, "POOL", 1)  # lines are kept as often as this many batches are done
    data, partial = tmp_path / "texts.jsonl", tmp_path / "out.jsonl.partial"
    texts = ["No, thanks, not today", "?", *TEXTS]
    data.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    command = ["classify", folder, "--data", data, "--batch-size", 2]
    whole = tmp_path / "whole.jsonl"
    llmq(*command, "--out", whole)
    command += ["--out", tmp_path / "out.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(lq.LanguageModel, "classify_rows", stopped_at(2, lq.LanguageModel.classify_rows))
        assert llmq(*command) == (130, "", f"2 of 5 are in {partial}: the command goes on from there\n")
    assert sorted(tmp_path.iterdir()) == [partial, data, whole]
    return command, whole.read_text(), partial


def test_the_same_command_goes_on_where_it_was_stopped(stopped, llmq, tmp_path):
    command, expected, partial = stopped
    assert partial.read_text().splitlines()[1:] == expected.splitlines()[:2]
    with partial.open("a") as file:
        file.write(expected.splitlines()[2][:-9])  # as a kill tears a line
    code, out, err = llmq(*command)
    assert (code, err) == (0, f"going on after 2 of 5, found in {partial}\n")
    assert out.startswith(f"written: {tmp_path / 'out.jsonl'}, 5 texts: ")
    assert (tmp_path / "out.jsonl").read_text() == expected
    assert not partial.exists()


def test_another_command_does_not_go_on(stopped, llmq, tmp_path):
    command, _, partial = stopped
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n')
    before = partial.read_bytes()
    for options, named in (
        (["--max-length", 3], "--max-length, --data"),
        (["--dtype", "bfloat16"], "--model"),  # other weights
        (["--data", other], "--data"),
    ):
        code, _, err = llmq(*command, *options)
        assert (code, partial.read_bytes()) == (2, before)
        assert f"{partial} was begun by a command that differs in {named}; give that one again to go on" in err


def test_what_json_has_no_form_for_goes_on(llmq, folder, tmp_path, monkeypatch, stopped_at):
    monkeypatch.setattr(length_buckets, "POOL", 1)
    days = [
        {"day": datetime.date(2024, 1, day), "figure": float("nan"), "text": text} for day, text in enumerate(TEXTS, 1)
    ]
    pq.write_table(pa.Table.from_pylist(days), tmp_path / "texts.parquet")
    command = ["classify", folder, "--data", tmp_path / "texts.parquet", "--batch-size", 1]
    _, expected, _ = llmq(*command, "--json")
    with monkeypatch.context() as patch:
        patch.setattr(lq.LanguageModel, "classify_rows", stopped_at(3, lq.LanguageModel.classify_rows))
        llmq(*command, "--out", tmp_path / "out.jsonl")
    assert llmq(*command, "--out", tmp_path / "out.jsonl")[0] == 0
    assert (tmp_path / "out.jsonl").read_text() == expected and '"2024-01-01", "figure": NaN' in expected


BAD_FILES = [
    ("a.jsonl", '{"text": "x"}\n{"text": " "}', [], "a.jsonl: line 2: field 'text' holds no text"),
    (
        "a.jsonl",
        '{"text": "x", "label": "ham", "given_label": 1}',
        ["--json"],
        "line 1 has fields 'label' and 'given_label', the name under which the first would come out; rename one",
    ),
    ("a.jsonl", '{"text": "x", "id": "\\ud800"}', [], "line 1: half a surrogate pair at character"),
    ("a.csv", "id,body\n1,x\n", [], "the header has no field 'text' (fields found: id, body): choose one with --text-"),
    ("a.csv", "id,text\n1,x\n", ["--columns", "id,text"], "line 1 is a header; leave out --columns"),
    (
        "a.jsonl",
        '{"text": "x"}',
        ["--columns", "id,text"],
        "--columns has no effect on a.jsonl, which is no .csv or .ts",
    ),
    ("a.txt", " ", [], "a.txt holds no text; remove it"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD_FILES)
def test_bad_files(llmq, folder, name, content, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    code, out, err = llmq("classify", folder, "--data", name, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


def test_long_texts_are_cut_and_counted(llmq, classifier, folder):
    code, out, err = llmq("classify", folder, "--text", "abcdefgh", "--text", "ab", "--max-length", 4, "--json")
    assert code == 0 and err == "1 of 2 texts cut to 4 tokens\n"
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0]["probabilities"] == pytest.approx(expected(classifier, "abcd"), abs=1e-5)


def test_labelled_texts_are_classified_where_no_record_comes_out(llmq, folder, tmp_path):
    (tmp_path / "labelled.tsv").write_text("ham\tab\n")
    _, expected, _ = llmq("classify", folder, "--text", "ab")
    assert llmq("classify", folder, "--data", tmp_path / "labelled.tsv", "--columns", "label,text") == (0, expected, "")


def test_a_scalar_head_gives_a_number(llmq, tiny_model, tmp_path):
    lm = with_classifier(tiny_model, ["reward"])
    lq.save_hf(lm, tmp_path / "reward")
    _, out, _ = llmq("classify", tmp_path / "reward", "--text", "ab", "--json")
    score = pytest.approx(float(lm.classify(["ab"])[0, 0]), abs=1e-6)
    assert json.loads(out) == {"text": "ab", "scores": {"reward": score}}
    _, out, _ = llmq("classify", tmp_path / "reward", "--text", "ab")
    assert out.startswith("reward ") and out.endswith("  ab\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give texts: --text TEXT, once or several times, or --data FILE"),
        (["--text", "a", "--data", "b"], "one of the two"),
        (["--data", "-"], "--data takes a file or a folder; for a text on standard input give --text -"),
        (["--text", "-", "--text", "-"], "--text - is given twice, and standard input is one text; give it once"),
        (["--text", "-"], "standard input holds no text"),
        (["--text", "a", "--text-field", "b"], "--text-field has no effect without --data"),
        (["--data", "a.txt", "--text-field", "b"], "--text-field has no effect on a.txt, which has no fields"),
        (["--text", "a", "--batch-size", 0], "--batch-size is 0 and must be at least 1"),
        (["--text", "a", "--max-length", 33], "--max-length 33 must lie between 1 and the model's 32"),
        (["--text", "a", "--columns", "b"], "--columns has no effect without --data"),
        (["--text", "a", "--text", ""], "--text number 2: field 'text' holds no text"),
        (["--text", "a", "--out", "a.csv"], "give it a name ending in .jsonl"),
        (["--text", "a", "--out", "nowhere/a.jsonl"], "nothing can be written to the folder nowhere"),
        (["--text", "a", "--out", "a.jsonl", "--json"], "--json has no effect beside --out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(llmq, folder, options, message, tmp_path, monkeypatch, piped):
    piped("\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = llmq("classify", folder, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


def test_lines_of_json_in_the_pipe_are_no_text(llmq, folder, piped):
    for lines, found, option in (
        ('{"text": "a"}\n{"text": "b"}\n', "text", ""),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 2}\n', "prompt, id", " and --text-field"),
    ):
        piped(lines)
        fault = (
            f"error: standard input is taken as one text, and holds lines of JSON (fields found: {found}); give --data "
            f"FILE.jsonl{option} instead, or a .txt file if the JSON is the text\n"
        )
        assert llmq("classify", folder, "--text", "-") == (2, "", fault)
    piped('[{"text": "a"}]')
    fault = "holds JSON (fields found: text); give --data FILE.json instead"
    assert fault in llmq("classify", folder, "--text", "-")[2]


def test_the_help_shows_commands_as_they_are_typed(llmq, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = llmq("classify", "--help")
    assert '\n    llmq classify runs/spam --text "You have won a prize" --text "See you at noon"\n' in out


def test_a_language_model_classifies_nothing(llmq, model_folder):
    code, _, err = llmq("classify", model_folder, "--text", "a")
    assert code == 2 and err.count("\n") == 1 and "is a language model, which knows no classes" in err


@pytest.mark.parametrize("verb", [("generate", "--prompt", "a"), ("chat",), ("evaluate", "text.txt")])
def test_a_classifier_writes_nothing(llmq, folder, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    name, *rest = verb
    code, _, err = llmq(name, folder, *rest)
    assert code == 2 and err.count("\n") == 1 and "is a classifier (ham, spam, eggs) and gives no token" in err
