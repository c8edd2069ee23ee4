"""What the figures for a GPU are made of, and the program from end to end at the size of a moment."""

import pytest

import llmq_jax as lq
from bench import gpu
from llmq_jax.command_line import run
from llmq_jax.training.flops import passed_weights


def test_published_sizes():
    mixture = gpu.config_of(gpu.MIXTURE, None, 4096)
    assert 0.7e9 < passed_weights(mixture) < 1.2e9
    assert gpu.cache_bytes(lq.preset("llama3.2-1b"), 100) == 2 * 16 * 100 * 8 * 128


@pytest.mark.exhaustive
def test_it_runs(monkeypatch, capsys):
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    monkeypatch.setattr(gpu, "SMALL", {**gpu.SMALL, **small, "kv_lora_rank": 16, "num_attention_heads": 2})
    for name, value in {"WARM_UP": 1, "ROUNDS": 1, "STEPS": 1, "PROMPT": 8, "SHORT": 4, "LONG": 8}.items():
        monkeypatch.setattr(gpu, name, value)
    words = [gpu.MIXTURE, "--device", "cpu", "--attention", "auto", "--layers", "2", "--batch-size", "2"]
    with pytest.raises(SystemExit) as stop:
        run(gpu.main, [*words, "--context", "16"], program="gpu")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "training, 2 x 16 tokens" in out and "decoding, 1 row" in out and "peak unknown" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["gpt3"], "unknown model 'gpt3'"),
        (["--layers", "0"], "--layers is 0 and must be at least 1"),
        (["--device", "gpu"], "--device gpu: JAX finds no GPU here"),
    ],
)
def test_bad_input(words, why, capsys):
    with pytest.raises(SystemExit) as stop:
        run(gpu.main, words, program="gpu")
    assert stop.value.code == 2 and why in capsys.readouterr().err
