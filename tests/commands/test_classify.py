import json

import numpy as np
import pytest

import llmq_jax as lq
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


def test_texts(llmq, classifier, folder):
    options = [option for text in TEXTS for option in ("--text", text)]
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
    options = ("--data", data, "--text-field", "message", "--output", output, "--batch-size", batch_size)
    code, out, err = llmq("classify", folder, *options)
    assert (code, err) == (0, "") and f"written: {output}, 3 texts: " in out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    for row in rows:
        assert row["probabilities"] == pytest.approx(expected(classifier, row["text"]), abs=1e-5)


def test_long_texts_are_cut_and_counted(llmq, classifier, folder):
    code, out, err = llmq("classify", folder, "--text", "abcdefgh", "--text", "ab", "--max-length", 4, "--json")
    assert code == 0 and err == "1 of 2 texts are cut to 4 tokens\n"
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0]["probabilities"] == pytest.approx(expected(classifier, "abcd"), abs=1e-5)


def test_a_scalar_head_gives_a_number(llmq, tiny_model, tmp_path):
    lm = with_classifier(tiny_model, ["reward"])
    lq.save_hf(lm, tmp_path / "reward")
    _, out, _ = llmq("classify", tmp_path / "reward", "--text", "ab", "--json")
    assert json.loads(out) == {"text": "ab", "reward": pytest.approx(float(lm.classify(["ab"])[0, 0]), abs=1e-6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give texts: --text TEXT, once or several times, or --data FILE"),
        (["--text", "a", "--data", "b"], "one of the two"),
        (["--text", "a", "--text-field", "b"], "--text-field has no effect without --data"),
        (["--data", "a.txt", "--text-field", "b"], "--text-field has no effect on a.txt, which has no fields"),
        (["--text", "a", "--batch-size", 0], "--batch-size is 0 and must be at least 1"),
        (["--text", "a", "--max-length", 33], "--max-length 33 must lie between 1 and the model's 32"),
        (["--text", "a", "--output", "a.csv"], "give it a name ending in .jsonl"),
        (["--text", "a", "--output", "nowhere/a.jsonl"], "there is no folder nowhere"),
        (["--text", "a", "--output", "a.jsonl", "--json"], "--json has no effect beside --output"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(llmq, folder, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = llmq("classify", folder, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


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
