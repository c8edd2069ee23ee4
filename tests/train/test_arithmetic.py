import json
from pathlib import Path

import pytest

import llmq_jax as lq
from train import arithmetic


@pytest.mark.exhaustive
def test_a_model_warms_up_and_learns_by_trying(monkeypatch, tmp_path, program):
    """Everything at the size of a moment: the files, the parts that share no sum, and a run that uses them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arithmetic, "WATCHED", 8)
    monkeypatch.setattr(arithmetic, "ENOUGH", 0.0)
    monkeypatch.setattr(arithmetic, "WARM_UP_BATCH", 4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(arithmetic, "SIZES", {**arithmetic.SIZES, **sizes})
    settings = {**arithmetic.SETTINGS, "prompts_per_step": 2, "group_size": 2, "validation_prompts": 4}
    monkeypatch.setattr(arithmetic, "SETTINGS", settings)

    words = ("train.arithmetic", "--out", "runs/add", "--steps", "1")
    code, out, _ = program(*words)
    assert code == 0
    assert "warm-up: 5 steps of 4 sums" in out
    assert "step 0: validation reward" in out
    training, watched, held_out = arithmetic.sums(0)
    assert len({*training, *watched, *held_out}) == len(training) + len(watched) + len(held_out) == 10_000
    record = json.loads(Path("runs/add/held-out.jsonl").read_text().splitlines()[0])
    a, b = map(int, record["prompt"].rstrip("=").split("+"))
    assert record["answer"][::-1] == f"{a + b:03}" and (a, b) in held_out  # units first
    assert lq.load("runs/add/run").config == lq.load("runs/add/warm-0").config
    # Again: the model that was warmed up stays, and the run is finished.
    code, out, _ = program(*words)
    assert code == 0 and "finished already" in out
