"""`llmq evaluate MODEL --tasks ...`: what it prints; what it finds is in tests/interop/test_evaluation_harness.py."""

import functools
import json
import sys

import datasets
import lm_eval
import pytest

from llmq_jax.interop import evaluation_harness
from llmq_jax.interop.evaluation_harness import HarnessModel, load_tasks
from tests.harness_tasks import leave_out_what_takes_seconds, write_tasks


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    lines = (folder / "local_texts.yaml").read_text().replace("data.jsonl", "absent.jsonl")
    (folder / "no_data.yaml").write_text(lines.replace("local_texts", "no_data"))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    leave_out_what_takes_seconds(monkeypatch)
    datasets.disable_progress_bars()  # which are drawn where data is read for the first time
    only_own = functools.partial(evaluation_harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(evaluation_harness, "_task_manager", lambda names, folder: only_own(include_path=str(folder)))


def test_the_harness_table(llmq, model_folder, task_folder, tmp_path):
    """And all that it says, in a file."""
    out = tmp_path / "results.json"
    arguments = ["evaluate", model_folder, "--tasks", "local_choice, local_texts", "--include-path", task_folder]
    code, table, _ = llmq(*arguments, "--limit", 3, "--num-fewshot", 2, "--batch-size", 2, "--out", out)
    assert code == 0
    results = json.loads(out.read_text())
    assert results["config"]["model"] == str(model_folder)
    assert results["n-samples"]["local_choice"]["effective"] == 3
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][:5] == ["Tasks", "Version", "Filter", "n-shot", "Metric"]
    row = next(row for row in rows if row[0] == "local_choice")
    assert row[3:5] == ["2", "acc"] and row[6] == f"{results['results']['local_choice']['acc,none']:.4f}"


def test_json_and_chat(llmq, chat_folder, task_folder):
    """One line on stdout, whatever the harness remarks; questions in the model's template."""
    arguments = ["evaluate", chat_folder, "--tasks", "local_answers", "--include-path", task_folder, "--context", 60]
    code, line, _ = llmq(*arguments, "--chat", "--json")
    assert code == 0 and line.count("\n") == 1
    tasks, manager = load_tasks(["local_answers"], task_folder)
    model = HarnessModel(chat_folder, max_length=60)
    expected = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, apply_chat_template=True)
    assert json.loads(line)["local_answers"] == pytest.approx(expected["results"]["local_answers"], abs=1e-6)
    asked = expected["samples"]["local_answers"][0]["arguments"][0][0]
    assert asked == "<|user|>what is warm?<|end|><|assistant|>"


def test_a_context_is_what_the_harness_reads_at_a_time(llmq, model_folder, task_folder):
    arguments = ["evaluate", model_folder, "--tasks", "local_texts", "--include-path", task_folder, "--limit", 1]
    short, whole = (json.loads(llmq(*arguments, "--json", "--context", n)[1])["local_texts"] for n in (3, 32))
    assert short["bits_per_byte,none"] != pytest.approx(whole["bits_per_byte,none"], rel=1e-6)


def test_results_are_printed_where_they_cannot_be_written(llmq, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("llmq_jax.commands.evaluate.results_of_tasks", lambda options: {"results": {"a": 1}})
    monkeypatch.setattr("llmq_jax.atomic_files.write_atomically", full)
    out = tmp_path / "results.json"
    ended = llmq("evaluate", "model", "--tasks", "a", "--json", "--out", out)
    assert ended == (2, '{"a": 1}\n', f"error: No space left on device: {out}\n")


TASK = ["--tasks", "local_choice", "--include-path", "TASKS"]
BAD = {
    "neither": (["MODEL"], "give a text, as llmq evaluate MODEL FILE, or tasks"),
    "both": (["MODEL", "text.txt", *TASK], "one of them"),
    "limit": (["MODEL", *TASK, "--limit", "0"], "--limit is 0 and must be at least 1"),
    "few shots": (["MODEL", *TASK, "--num-fewshot", "-1"], "--num-fewshot is -1 and must be at least 0"),
    "batch size": (["MODEL", *TASK, "--batch-size", "0"], "--batch-size is 0 and must be at least 1"),
    "context": (["MODEL", *TASK, "--context", "33"], "--context 33 must lie between 1 and the model's context, 32"),
    "no folder": (["MODEL", "--tasks", "a", "--include-path", "nowhere"], "--include-path nowhere: there is no such"),
    "no template": (["MODEL", *TASK, "--chat"], "has no chat template"),
    "not JSON": (["MODEL", *TASK, "--out", "results.txt"], "give it a name ending in .json"),
    "no model": (["nowhere", *TASK], "nowhere"),
    "for texts": (["MODEL", *TASK, "--text-field", "body"], "--text-field has no effect on --tasks"),
    "split of texts": (["MODEL", *TASK, "--split", "test"], "--split has no effect on --tasks, only on a text; leave"),
    "for tasks": (["MODEL", "text.txt", "--limit", "3"], "--limit has no effect on a text, only on --tasks; leave it"),
    "none for tasks": (["MODEL", "text.txt", "--num-fewshot", "0"], "--num-fewshot has no effect on a text, only on"),
    "near a task": (["MODEL", "--tasks", "local_choise", *TASK[2:]], "did you mean local_choice"),
    "no task": (["MODEL", "--tasks", "x", *TASK[2:]], "has no task 'x': lm_eval ls tasks lists them all"),
    "no data": (["MODEL", "--tasks", "no_data", *TASK[2:]], "task no_data cannot be loaded: FileNotFoundError"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(llmq, model_folder, task_folder, case):
    arguments, message = BAD[case]
    names = {"MODEL": model_folder, "TASKS": task_folder}
    code, out, err = llmq("evaluate", *(names.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_without_the_harness(llmq, model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "llmq_jax.interop.evaluation_harness")
    code, out, err = llmq("evaluate", model_folder, "--tasks", "hellaswag")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "pip install -e '.[eval]'" in err


def test_tasks_of_one_s_own_need_no_others(task_folder, monkeypatch):
    monkeypatch.undo()
    _, manager = load_tasks(["local_choice"], task_folder)
    assert manager.all_tasks == ["local_answers", "local_choice", "local_texts", "no_data"]
