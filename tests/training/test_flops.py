"""What a token of training costs, by the products that the program makes; and how it is told of a device."""

import io
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import llmq_jax as lq
from bench.products import products_of
from llmq_jax.layers import lora
from llmq_jax.layers.fresh_adapters import add_adapters
from llmq_jax.training import flops, recorder
from llmq_jax.training.flops import Peak, attention_flops, passed_weights, peak_of, token_flops, token_utilisation
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.parts import LORA
from tests.mesh_program import CONFIGS
from tests.training import tiny_run
from tests.training.tiny_run import OPTIONS

LENGTH = 12
ALL_SCORES = 2 * LENGTH / (LENGTH + 1)
"""The plain formula makes all scores, of which a token sees about half."""


def products(function, *arguments):
    """FLOP of all products, a token of two rows."""
    return sum(product.flops for product in products_of(function, *arguments)) / (2 * LENGTH)


def plain(config):
    """(model, shapes of its variables, and of a batch)"""
    model = lq.build(config, attention="plain", scan_layers=False)
    return model, jax.eval_shape(lambda: lq.init(config)), jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "deepseek3"])
def test_counted_work_is_that_of_a_forward_pass(name):
    """Of experts just as many as a token passes."""
    config = CONFIGS[name]()
    if name == "deepseek3":
        changes = {"n_routed_experts": 3, "n_group": 1, "topk_group": 1}
        config = lq.DeepSeekV3Config(**{**vars(config), "experts": {"dispatch": "dense"}, "balance": None, **changes})
    model, variables, tokens = plain(config)
    found = products(lambda variables, tokens: model.apply(variables, tokens), variables, tokens)
    # What the dense dispatch mixes experts' outputs by, in two layers: no weight is in it.
    mixing = 2 * (2 * 3 * 16 + 2 * 3 * 3) if name == "deepseek3" else 0
    assert found == pytest.approx(2 * passed_weights(config) + ALL_SCORES * attention_flops(config, LENGTH) + mixing)


def test_modules_of_multi_token_prediction_pass_the_head_again():
    config = CONFIGS["deepseek3"]()
    changes = {"num_nextn_predict_layers": 2, "first_k_dense_replace": 3, "n_group": 1, "topk_group": 1}
    config = lq.DeepSeekV3Config(**{**vars(config), "experts": None, "balance": None, **changes})
    model, variables, tokens = plain(config)
    found = products(lambda variables, tokens: model.apply(variables, tokens, method="mtp_logits"), variables, tokens)
    # mtp_logits gives those of the modules alone, of the tokens that they have a target for.
    head = config.hidden_size * config.vocab_size
    unembedded = head * (1 + (1 + 2) / LENGTH)
    expected = 2 * (passed_weights(config, modules=2) - unembedded) + ALL_SCORES * attention_flops(config, LENGTH, 2)
    assert found == pytest.approx(expected)


def trained_products(model, trained, rest, tokens):
    def loss(trained, rest, tokens):
        return model.apply({**rest, **trained}, tokens).sum()

    return products(jax.grad(loss), trained, rest, tokens)


def test_counted_work_of_training_is_that_of_a_gradient():
    for name in ("gpt2", "llama3"):
        config = CONFIGS[name]()
        model, variables, tokens = plain(config)
        found = trained_products(model, variables, {}, tokens)
        all_scores = 3 * (ALL_SCORES - 1) * attention_flops(config, LENGTH)
        assert found == pytest.approx(token_flops(config, LENGTH) + all_scores)


def test_with_adapters_no_weight_has_a_gradient():
    """But for the adapters' own products, which do not count, and the first layer, before which nothing learns."""
    config = CONFIGS["llama3"]()
    model, _, tokens = plain(config)
    variables = add_adapters(lq.init(config), model.layer_paths(), lora.LoRA(rank=1))
    trained, rest = {LORA: variables.pop(LORA)}, variables
    found = trained_products(model, trained, rest, tokens)
    found -= 3 * (ALL_SCORES - 1) * attention_flops(config, LENGTH)
    own = 6 * sum(leaf.size for leaf in jax.tree.leaves(trained))
    first = 2 * config.hidden_size * (config.hidden_size + 2 * config.hidden_size // 2)  # queries, keys and values
    counted = token_flops(config, LENGTH, adapters=True)
    assert counted - first <= found <= counted + own < token_flops(config, LENGTH)


def test_sequences_of_several_lengths_and_a_part_that_is_unembedded():
    config = CONFIGS["llama3"]()
    mean = (4 * attention_flops(config, 4) + 12 * attention_flops(config, 12)) / 16
    assert attention_flops(config, [4, 12]) == pytest.approx(mean)
    head = config.hidden_size * config.vocab_size
    assert passed_weights(config) - passed_weights(config, unembedded=0.25) == 0.75 * head
    classifier = lq.Llama3Config(**{**vars(config), "labels": ("no", "yes"), "tie_word_embeddings": True})
    assert passed_weights(classifier) == passed_weights(config) - head + 2 * config.hidden_size


def test_experts_of_any_decoder_are_counted():
    dense = CONFIGS["llama3"]()
    experts = lq.Llama3Config(**{**vars(dense), "experts": {"num_experts": 4, "top_k": 2}})
    network, router = 3 * dense.hidden_size * dense.intermediate_size, 4 * dense.hidden_size
    assert passed_weights(experts) - passed_weights(dense) == dense.num_hidden_layers * (network + router)


def test_published_sizes():
    assert passed_weights(lq.preset("gpt2-124m")) == 124_439_808 - 1024 * 768 - 121_344  # positions, biases, norms
    # Of 4,096 tokens a mean of 2,048.5 is seen; of a window of 1,024 fewer.
    assert attention_flops(lq.preset("llama3.2-1b"), 4096) == 16 * 2048.5 * 32 * 2 * 128
    assert attention_flops(lq.preset("qwen3-0.6b"), 4096) == 28 * 2048.5 * 16 * 2 * 256  # heads wider than D / H
    assert attention_flops(lq.preset("gemma3-1b"), 4096) < 0.4 * 26 * 2048.5 * 4 * 2 * 512


def test_peaks_are_found_by_the_name_of_a_device():
    for kind, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
    ):
        assert peak_of(kind).flops == peak
    assert peak_of("NVIDIA A100-SXM4-40GB").bandwidth < peak_of("NVIDIA A100-SXM4-80GB").bandwidth
    assert peak_of("cpu") is peak_of("NVIDIA GB200") is None  # which is more than a B200


TPUS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"}
TPUS |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "7x"}


@pytest.mark.parametrize("kind", TPUS)
def test_peaks_of_tpus_are_those_that_jax_knows(kind):
    """Of the v5p's memory it gives nine tenths of what the data sheet says."""
    version = pltpu.ChipVersion(TPUS[kind])
    cores = 2 if version.supports_megacore else 1  # of a device
    known = pltpu.get_tpu_info_for_chip(version, cores)
    found = peak_of(kind)
    assert found.flops == pytest.approx(known.bf16_ops_per_second * cores, rel=0.003)
    assert found.bandwidth == pytest.approx(known.mem_bw_bytes_per_second * cores, rel=0.13)


def test_peaks_of_other_tpus_are_not_known():
    assert peak_of("TPU v4 lite") is peak_of("TPU v3") is None


@pytest.fixture
def known(monkeypatch):
    """A device whose peak is known."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(flops.PEAKS, kind, Peak(1e9, 1e9))


def test_utilisation_is_of_all_devices_that_compute(known):
    state = {"a": jnp.ones(3), "b": np.ones(3)}
    assert token_utilisation(2e6, state) == 2e-3
    assert token_utilisation(2e6, state, replicas=4) == 5e-4
    assert token_utilisation(None, state) is None


def trained(folder, **changed):
    output = io.StringIO()
    result = tiny_run.run(folder, options=OPTIONS, output=output, **changed)
    return result, output.getvalue(), read_metrics(folder / "metrics.jsonl")


def test_a_run_tells_its_utilisation_and_what_the_device_held(tmp_path, known, monkeypatch):
    monkeypatch.setattr(recorder, "device_memory_bytes", lambda: 12345)
    result, said, records = trained(tmp_path / "run", flops_per_token=1000.0)
    training = [record for record in records if "loss" in record]
    assert "mfu" not in training[0]  # nor is there a speed
    for record in training[1:]:
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 1e-6)
    assert {record["memory_bytes"] for record in training} == {12345}
    assert result.mfu == pytest.approx(result.tokens_per_second * 1e-6)
    assert json.loads((tmp_path / "run/finished.json").read_text())["mfu"] == result.mfu
    assert f"tokens/s, MFU {result.mfu:.1%}, peak memory" in said
    assert "tokens/s  MFU" in said.splitlines()[1]
    assert "<dt>MFU</dt>" in (tmp_path / "run/report.html").read_text()


def test_what_is_not_known_is_not_shown(tmp_path):
    """Of a CPU neither the peak nor what it holds."""
    result, said, records = trained(tmp_path / "run", flops_per_token=1000.0)
    page = (tmp_path / "run/report.html").read_text()  # whose pictures, in letters, may spell anything
    assert result.mfu is None and "MFU" not in said and "<dt>MFU</dt>" not in page
    assert not any({"mfu", "memory_bytes"} & record.keys() for record in records)


def test_memory_is_the_most_that_a_gpu_tells_of(monkeypatch):
    from llmq_jax.training import report

    device = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 5, "peak_bytes_in_use": 9})
    monkeypatch.setattr(report.jax, "local_devices", lambda: [device])
    assert report.device_memory_bytes() == report.peak_memory_bytes() == 9
    device.memory_stats = lambda: None
    assert report.device_memory_bytes() is None and report.peak_memory_bytes() > 9
