"""The formulas of the original repository's two mixtures of experts: outputs, losses, counts, biases, gradients.

Its classic one has GELU experts with biases and a router with a bias, its DeepSeek one bias-free SwiGLU experts, a
shared one, a softmax router with a bias and a bias for selection. Weights are put in by hand: its models have no layout
with experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from llmq_jax.interop import from_state_dict
from llmq_jax.layers.expert_balance import Balance, all_layers, balance_losses, max_violation, moved_bias
from llmq_jax.layers.moe import Experts, MixtureOfExperts, route
from llmq_jax.models import GPT2Config, build
from llmq_jax.objectives import NextToken
from tests.parity.golden import read_golden

NORMAL = nn.initializers.normal(0.02)
EXACT = {"rtol": 0, "atol": 1e-5}


def classic_params(arrays, prefix, count):
    """The original's `MoE` as ours."""

    def stack(layer, kind):
        return np.stack([arrays[f"{prefix}experts.{e}.layers.{layer}.{kind}"] for e in range(count)])

    return {
        "router": {"kernel": arrays[f"{prefix}gate.weight"].T, "bias": arrays[f"{prefix}gate.bias"]},
        "up_kernel": stack(0, "weight").swapaxes(1, 2)[:, :, None],
        "up_bias": stack(0, "bias")[:, None],
        "down_kernel": stack(2, "weight").swapaxes(1, 2),
        "down_bias": stack(2, "bias"),
    }


def deepseek_params(arrays, prefix, count):
    """The original's `DeepSeekMoE` as ours: `lin1` is the gate, `lin_gate` what it multiplies."""

    def stack(name):
        return np.stack([arrays[f"{prefix}routed_experts.{e}.{name}.weight"].T for e in range(count)])

    shared = {
        ours: {"kernel": arrays[f"{prefix}shared_experts.0.{name}.weight"].T}
        for ours, name in (("gate", "lin1"), ("up", "lin_gate"), ("down", "lin2"))
    }
    return {
        "router": {"kernel": arrays[f"{prefix}gate.weight"].T, "bias": arrays[f"{prefix}gate.bias"]},
        "up_kernel": np.stack([stack("lin1"), stack("lin_gate")], axis=2),
        "down_kernel": stack("lin2"),
        "shared": shared,
    }


def assert_same(ours, theirs, scale=1.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale), ours, theirs)


@pytest.mark.parametrize("dispatch", ["dense", "blocks", "ragged"])
def test_the_classic_mixture(dispatch):
    arrays, meta = read_golden("sparse_moe")
    balance = Balance(load_balance=meta["load_coeff_used"], router_z=meta["z_coeff_used"])
    experts = Experts(meta["num_experts"], meta["top_k"], router_bias=True, dispatch=dispatch, balance=balance)
    layer = MixtureOfExperts(experts, 64, False, "gelu", True, NORMAL, NORMAL)
    params = jax.tree.map(jnp.asarray, classic_params(arrays, "param/", meta["num_experts"]))

    def loss(params):
        mixed, report = layer.apply({"params": params}, jnp.asarray(arrays["in/x"]))
        reports = jax.tree.map(lambda leaf: leaf[None], report)
        losses = balance_losses(reports, balance, experts.top_k)
        total = sum(getattr(balance, name) * value for name, value in losses.items())
        return (mixed * arrays["in/cotangent"]).sum() + total, (mixed, report, losses, total)

    (value, (mixed, report, losses, total)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(mixed, arrays["out/y"], **EXACT)
    np.testing.assert_array_equal(report.assigned, arrays["out/counts"])
    np.testing.assert_allclose(losses["load_balance"], arrays["out/load_balance_loss"], rtol=1e-5)
    np.testing.assert_allclose(losses["router_z"], arrays["out/z_loss"], rtol=1e-5)
    np.testing.assert_allclose(total, arrays["out/moe_loss"], rtol=1e-5)
    np.testing.assert_allclose(value, arrays["out/loss"], rtol=1e-5)
    assert_same(gradients, classic_params(arrays, "grad/", meta["num_experts"]), meta["fp32_vs_fp64"]["max_abs_grad"])


@pytest.mark.parametrize("dispatch", ["dense", "blocks", "ragged"])
def test_the_deepseek_mixture(dispatch):
    arrays, meta = read_golden("deepseek_moe")
    balance = Balance(bias_rate=meta["bias_update_rate_used"])
    experts = Experts(
        meta["num_routed"],
        meta["top_k"],
        num_shared=meta["num_shared_experts"],
        router_bias=True,
        selection_bias=True,
        dispatch=dispatch,
        balance=balance,
    )
    layer = MixtureOfExperts(experts, meta["expert_hidden"], True, "silu", False, NORMAL, NORMAL)
    params = jax.tree.map(jnp.asarray, deepseek_params(arrays, "param/", meta["num_routed"]))
    bias = jnp.asarray(arrays["param/biases"])

    def loss(params):
        mixed, report = layer.apply({"params": params, "router": {"bias": bias}}, jnp.asarray(arrays["in/x"]))
        return (mixed * arrays["in/cotangent"]).sum(), (mixed, report)

    (value, (mixed, report)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    ids, _, _ = route(jnp.asarray(arrays["out/gate_logits"]), experts, bias)
    np.testing.assert_array_equal(np.sort(ids, axis=-1), arrays["out/topk_idx_sorted"])
    np.testing.assert_allclose(mixed, arrays["out/y"], **EXACT)
    np.testing.assert_array_equal(report.assigned, arrays["out/counts"])
    np.testing.assert_allclose(moved_bias(bias, report.assigned, balance), arrays["out/biases_after"], **EXACT)
    np.testing.assert_allclose(max_violation(report.assigned), arrays["out/max_vio"], rtol=1e-6)
    np.testing.assert_allclose(value, arrays["out/loss"], rtol=1e-5)
    assert_same(gradients, deepseek_params(arrays, "grad/", meta["num_routed"]), meta["fp32_vs_fp64"]["max_abs_grad"])


def test_gpt_with_the_classic_mixture():
    """Its loss sums what the layers add, ours is their mean: the coefficients are times the number of layers."""
    arrays, meta = read_golden("gpt_sparse_moe")
    cfg, count, layers = meta["cfg"], meta["moe"]["num_experts"], meta["cfg"]["n_layers"]
    balance = Balance(load_balance=0.1 * layers, router_z=1e-3 * layers)
    experts = Experts(count, meta["moe"]["top_k"], 32, router_bias=True, balance=balance)
    sizes = {
        "vocab_size": cfg["vocab_size"],
        "max_position_embeddings": cfg["context_length"],
        "hidden_size": cfg["emb_dim"],
        "num_hidden_layers": layers,
        "num_attention_heads": cfg["n_heads"],
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }

    def variables(prefix):
        """All but the experts go through the layout of the original, in which we put zeros in their place."""
        state = {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix) and ".ffn." not in name and not name.endswith("mask")
        }
        for layer in range(layers):
            for number, shape in ((0, (64, 16)), (2, (16, 64))):
                state[f"trf_blocks.{layer}.ffn.layers.{number}.weight"] = np.zeros(shape, np.float32)
                state[f"trf_blocks.{layer}.ffn.layers.{number}.bias"] = np.zeros(shape[:1], np.float32)
        params = from_state_dict(state, GPT2Config(**sizes), "original")["params"]
        block = params["group_0"]["block_0"]
        del block["mlp"]
        stacked = [classic_params(arrays, f"{prefix}trf_blocks.{layer}.ffn.", count) for layer in range(layers)]
        block["moe"] = jax.tree.map(lambda *leaves: np.stack(leaves), *stacked)
        return {"params": jax.tree.map(jnp.asarray, params)}

    model = build(GPT2Config(**sizes, experts=experts))
    ours, tokens = variables("param/"), jnp.asarray(arrays["in/x"])

    @jax.jit
    def read_at_once(ours):
        reports = all_layers(model.apply(ours, tokens, method="forward").counts)
        return model.apply(ours, tokens), balance_losses(reports, balance, experts.top_k)

    logits, losses = read_at_once(ours)
    np.testing.assert_allclose(logits, arrays["out/logits"], rtol=0, atol=3e-4)
    added = sum(getattr(balance, name) * value for name, value in losses.items())
    np.testing.assert_allclose(added, arrays["out/moe_loss/0"] + arrays["out/moe_loss/1"], rtol=1e-4)

    objective = NextToken(model)
    targets = arrays["in/y"]
    batch = {"tokens": tokens, "targets": jnp.maximum(targets, 0), "mask": jnp.asarray(targets >= 0, jnp.float32)}

    @jax.jit
    @jax.value_and_grad
    def compute(ours):
        return objective.loss(ours, batch, objective.weights(batch), jax.random.key(0))[0]

    loss, gradients = compute(ours)
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), gradients, variables("grad/"))
    evaluated = jax.jit(lambda ours: objective.loss(ours, batch, objective.weights(batch))[0])(ours)
    np.testing.assert_allclose(evaluated, arrays["out/ce"], rtol=1e-5)
