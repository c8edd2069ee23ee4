import json
import math
import shutil

import jax
import numpy as np
import pytest
import tokenizers

TEXT = "".join(f"line {i} of a tëxt\n" for i in range(12))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def reference_loss(lm, tokens, context):
    """Mean over all targets, window after window, from full logits in float64."""
    losses = []
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = np.asarray(lm.logits([window[:-1]])[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logprobs[i, target] for i, target in enumerate(window[1:])]
    return float(np.mean(losses)), len(losses)


@pytest.mark.parametrize("context", [32, 7])
def test_figures_are_those_of_plain_windows(llmq, model_folder, tiny_model, text_file, context, piped):
    if context == 7:
        piped(TEXT)
        text_file = "-"
    code, out, err = llmq("evaluate", model_folder, text_file, "--context", context, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    tokens = list(TEXT.encode())
    loss, count = reference_loss(tiny_model, tokens, context)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(loss * count / len(tokens) / math.log(2), rel=1e-5)
    assert (result["tokens"], result["bytes"], result["context"]) == (count, len(tokens), context)


def test_windows_are_not_of_any_length(llmq, model_folder, text_file, monkeypatch):
    monkeypatch.setattr("llmq_jax.commands.evaluate.LONGEST", 9)
    for given, context in (((), 9), (("--context", 12), 12)):
        assert json.loads(llmq("evaluate", model_folder, text_file, "--json", *given)[1])["context"] == context


def test_batch_size_does_not_change_the_result(llmq, model_folder, text_file):
    results = [
        json.loads(llmq("evaluate", model_folder, text_file, "--json", "--batch-size", size)[1])["loss"]
        for size in (1, 3)
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_documents_are_joined_by_end_of_text(llmq, model_folder, tiny_model, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text('{"body": "first"}\n{"body": "second one"}\n')
    code, out, _ = llmq("evaluate", model_folder, path, "--text-field", "body", "--json")
    tokens = [*b"first", 256, *b"second one", 256]
    loss, count = reference_loss(tiny_model, tokens, 32)
    result = json.loads(out)
    assert code == 0 and result["loss"] == pytest.approx(loss, abs=1e-5)
    assert (result["tokens"], result["bytes"]) == (count, 15)
    assert result["bits_per_byte"] == pytest.approx(loss * 16 / 15 / math.log(2), rel=1e-5)


@pytest.mark.parametrize("begins", [257, 256])
def test_documents_that_begin_with_a_token_stand_alone(llmq, chat_folder, chat_model, tmp_path, begins):
    """As Llama 3's and Gemma's do: no such token is predicted, and none is text after another's end. One that also ends
    texts stands between them, and is predicted."""
    shutil.copytree(chat_folder, tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{tokenizer.id_to_token(begins)} $A", special_tokens=[(tokenizer.id_to_token(begins), begins)]
    )
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    path = tmp_path / "two.txt.jsonl"
    path.write_text('{"text": "first"}\n{"text": "second one"}\n')
    result = json.loads(llmq("evaluate", tmp_path / "model", path, "--json")[1])
    texts = [[257, *b"first", 256], [257, *b"second one", 256]]
    if begins == 256:
        texts = [[256, *b"first", 256, *b"second one", 256]]
    parts = [reference_loss(chat_model, text, 96) for text in texts]
    loss, count = (loss * n for loss, n in parts), sum(n for _, n in parts)
    assert result["loss"] == pytest.approx(sum(loss) / count, abs=1e-5)
    assert (result["tokens"], result["bytes"]) == (count, 15) == (17, 15)


def test_table_shows_the_same_figures(llmq, model_folder, text_file):
    result = json.loads(llmq("evaluate", model_folder, text_file, "--json")[1])
    lines = llmq("evaluate", model_folder, text_file)[1].splitlines()
    assert lines[0] == f"loss           {result['loss']:.4f} nats per token"
    assert len(lines) == 5


BAD = {
    "no model there": (["nowhere", "TEXT"], "nowhere"),
    "no file there": (["MODEL", "nothing.txt"], "there is no file or folder nothing.txt"),
    "context": (["MODEL", "TEXT", "--context", "33"], "--context 33 exceeds the model's context; choose at most 32"),
    "no text in the pipe": (["MODEL", "-"], "standard input holds no text"),
    "a split of the pipe": (["MODEL", "-", "--split", "test"], "--split has no effect on standard input"),
    "no context": (["MODEL", "TEXT", "--context", "0"], "context"),
    "no fields": (["MODEL", "TEXT", "--text-field", "body"], "--text-field has no effect on"),
    "batch size": (["MODEL", "TEXT", "--batch-size", "0"], "batch size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(llmq, model_folder, text_file, case, piped):
    piped(" ")
    arguments, message = BAD[case]
    names = {"MODEL": str(model_folder), "TEXT": str(text_file)}
    code, out, err = llmq("evaluate", *(names.get(a, a) for a in arguments))
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_lines_of_json_in_the_pipe_are_no_text(llmq, model_folder, tmp_path, piped):
    """A file with these lines has two documents, and another loss than the lines as they are."""
    lines = '{"text": "a cat"}\n{"text": "a dog"}\n'
    piped(lines)
    fault = (
        "error: standard input is taken as one text, and holds lines of JSON (fields found: text); give the name of a "
        ".jsonl file instead, or a .txt file if the JSON is the text\n"
    )
    assert llmq("evaluate", model_folder, "-") == (2, "", fault)
    piped('{"note": "a cat"}\n')
    fault = fault.replace("found: text", "found: note").replace(".jsonl file", ".jsonl file and --text-field")
    assert llmq("evaluate", model_folder, "-") == (2, "", fault)
    (tmp_path / "lines.txt").write_text(lines)
    assert llmq("evaluate", model_folder, tmp_path / "lines.txt")[0] == 0
    piped(json.dumps([{"text": "a cat"}, {"text": "a dog"}], indent=1))
    told = "holds JSON (fields found: text); give the name of a .json file instead, or a .txt file if"
    assert told in llmq("evaluate", model_folder, "-")[2]
    for text in ("{}\n", "{\n", "[1]\n", "[{}]", "[a] cat", "1\n"):
        piped(text)
        assert llmq("evaluate", model_folder, "-")[0] == 0


def test_json_without_the_field_names_row_and_fields(llmq, model_folder, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    code, _, err = llmq("evaluate", model_folder, path)
    assert code == 2 and "line 2" in err and "body" in err and "--text-field" in err


@pytest.mark.parametrize("mesh", [None, "tensor=1"])
def test_memory_that_has_run_out_is_told_in_a_line(llmq, model_folder, text_file, monkeypatch, mesh):
    def too_much(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes.\nand more")

    monkeypatch.setattr("llmq_jax.training.step.evaluate", too_much)
    options = () if mesh is None else ("--mesh", mesh)
    code, out, err = llmq("evaluate", model_folder, text_file, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: out of memory (Out of memory allocating 3.0 GiB), beside ")
    assert "take a smaller --context, a smaller --batch-size, " in err
    assert err.endswith("other axes of --mesh\n" if mesh else "--mesh tensor=N, where there are N devices\n")


def test_other_errors_are_not_taken_for_it(llmq, model_folder, text_file, monkeypatch):
    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("llmq_jax.training.step.evaluate", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        llmq("evaluate", model_folder, text_file)


def test_a_folder_is_of_one_split(llmq, model_folder, tmp_path):
    """Else what was learned would stand for what was not."""
    parts = {"train": ["a learned one", "another"], "test": ["first", "second one"]}
    for name, texts in parts.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "data" / name / f"{number}.txt").write_text(text)
    data = tmp_path / "data"
    for options, fault in (
        ((), "files of several splits (train/0.txt, test/0.txt)"),
        (("--split", "validation"), "no validation files, but others (train/0.txt, test/0.txt)"),
    ):
        code, out, err = llmq("evaluate", model_folder, data, *options)
        assert (code, out) == (2, "")
        assert err == f"error: {data} holds {fault}: choose by --split train or --split test\n"
    for arguments in ((data / "test",), (data, "--split", "test")):
        code, out, err = llmq("evaluate", model_folder, *arguments, "--json")
        assert (code, err) == (0, "") and json.loads(out)["bytes"] == len("first" + "second one")
    for path in (data / "test", data / "test" / "0.txt"):
        code, out, err = llmq("evaluate", model_folder, path, "--split", "test")
        assert (code, out) == (2, "") and "--split has no effect on" in err
