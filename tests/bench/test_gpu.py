"""What the figures for a GPU are made of, and the program from end to end at the size of a moment."""

import jax
import jax.numpy as jnp
import pytest

import llmq_jax as lq
from bench import gpu
from bench.products import products_of
from llmq_jax.command_line import run
from tests.mesh_program import CONFIGS

LENGTH = 12


@pytest.mark.parametrize("name", ["gpt2", "llama3", "deepseek3"])
def test_counted_work_is_that_of_the_program(name):
    """Products of a forward pass with all scores formed; of experts just as many as a token passes."""
    config = CONFIGS[name]()
    if name == "deepseek3":
        changes = {"n_routed_experts": 3, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
        config = lq.DeepSeekV3Config(**{**vars(config), "experts": {"dispatch": "dense"}, "balance": None, **changes})
    model = lq.build(config, attention="masked", scan_layers=False)
    variables = jax.eval_shape(lambda: lq.init(config))
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    found = products_of(lambda variables, tokens: model.apply(variables, tokens), variables, tokens)
    flops = sum(product.flops for product in found) / (2 * LENGTH)
    all_scores = gpu.attention_flops(config, LENGTH) * 2 * LENGTH / (LENGTH + 1)
    # What the dense dispatch mixes experts' outputs by, in two layers: no weight is in it.
    mixing = 2 * (2 * 3 * 16 + 2 * 3 * 3) if name == "deepseek3" else 0
    assert flops == pytest.approx(2 * gpu.passed_weights(config) + all_scores + mixing, rel=1e-6)


def test_published_sizes():
    assert gpu.passed_weights(lq.preset("gpt2-124m")) == 124_439_808 - 1024 * 768 - 121_344  # positions, biases, norms
    mixture = gpu.config_of(gpu.MIXTURE, None, 4096)
    assert 0.7e9 < gpu.passed_weights(mixture) < 1.2e9
    # Of 4,096 tokens a mean of 2,048.5 is seen; of a window of 1,024 fewer.
    llama = lq.preset("llama3.2-1b")
    assert gpu.attention_flops(llama, 4096) == 16 * 2048.5 * 32 * 2 * 128
    gemma = lq.preset("gemma3-1b")
    assert gpu.attention_flops(gemma, 4096) < 0.4 * 26 * 2048.5 * 4 * 2 * 512
    assert gpu.cache_bytes(llama, 100) == 2 * 16 * 100 * 8 * 128


@pytest.mark.exhaustive
def test_it_runs(monkeypatch, capsys):
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    monkeypatch.setattr(gpu, "SMALL", {**gpu.SMALL, **small, "kv_lora_rank": 16, "num_attention_heads": 2})
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "SHORT", 4)
    monkeypatch.setattr(gpu, "LONG", 8)
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
