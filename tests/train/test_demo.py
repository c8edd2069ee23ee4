import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import llmq_jax as lq
from llmq_jax.training.metrics import read_metrics
from tests.programs import ended
from train import demo, pretrain


def make_tiny(patch):
    """A little text, and a model of a moment."""
    modules = [("alpha", "def f(): pass\n" * 40), ("json", "def g(): pass\n" * 20), ("beta", "def h(): pass\n" * 40)]
    patch.setattr("llmq_jax.data.python_library_documents", lambda: modules)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "context": 16, "batch_size": 4}
    tiny = replace(pretrain.RUNS["demo"], **sizes, learning_rate=1e-2)
    patch.setitem(pretrain.RUNS, "demo", tiny)


def run_demo(patch, bound, steps):
    """The exit code."""
    patch.setattr(demo, "BOUND", bound)
    return ended("train.demo", "--out", "runs/demo", "--steps", steps)


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path, capsys):
    """`call(bound, steps)` -> (exit code, output) of the demo in an empty folder."""
    monkeypatch.chdir(tmp_path)
    make_tiny(monkeypatch)

    def call(bound, steps=30):
        return run_demo(monkeypatch, bound, steps), capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the demo has run, for tests of what becomes of it."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_tiny(patch)
        assert run_demo(patch, bound=5.0, steps=30) == 0
    return folder


def test_demo_trains_exports_and_compares(tiny_demo, drawn):
    code, out = tiny_demo(bound=5.0)
    assert code == 0
    # A shorter run tells as often as the whole one.
    told = [record["step"] for record in read_metrics(Path("runs/demo/metrics.jsonl")) if "loss" in record]
    assert told == list(range(1, 31))
    assert "within the bound of 5.0" in out and "logits identical" in out and "MISSED" not in out
    for name in ("report.html", "losses.png", "samples.txt", "metrics.jsonl", "config.json", "checkpoints"):
        assert name in out and Path("runs/demo", name).exists()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert name in out and Path("runs/demo-hf", name).exists()
    assert "llmq generate runs/demo --prompt" in out
    assert lq.load("runs/demo-hf").tokenizer.encode("ab") == [97, 98]


def test_second_call_finds_the_run_finished_and_a_missed_bound_is_told(tiny_demo, finished):
    shutil.copytree(finished / "runs", "runs")
    metrics = Path("runs/demo/metrics.jsonl").read_bytes()
    code, out = tiny_demo(bound=0.001)
    assert code == 1
    assert "runs/demo is finished already" in out and "MISSED the bound of 0.001" in out and "logits identical" in out
    assert Path("runs/demo/metrics.jsonl").read_bytes() == metrics


def test_a_single_step_has_no_speed_to_show(tiny_demo):
    code, out = tiny_demo(bound=9.0, steps=1)
    assert code == 0 and "1 step, 64 bytes" in out and "a second" not in out


def test_a_loss_that_was_not_measured_misses_the_bound(tiny_demo, monkeypatch):
    monkeypatch.setitem(pretrain.RUNS, "demo", replace(pretrain.RUNS["demo"], evaluate_every=0))
    code, out = tiny_demo(bound=9.0, steps=2)
    assert code == 1 and "not measured on held-out modules" in out and "MISSED" in out


def test_an_export_that_differs_is_told(tiny_demo, finished, monkeypatch):
    shutil.copytree(finished / "runs", "runs")
    load = lq.load

    def spoiled(path, **keywords):
        lm = load(path, **keywords)
        if str(path).endswith("-hf"):
            lm.params["final_norm"]["scale"] = lm.params["final_norm"]["scale"].at[0].add(1e-6)
        return lm

    monkeypatch.setattr("llmq_jax.model_files.load", spoiled)
    code, out = tiny_demo(bound=5.0)
    assert code == 1 and "logits DIFFER" in out
