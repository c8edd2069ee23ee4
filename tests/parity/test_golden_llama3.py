"""Llama of the original repository: its weights through the layout `original` give the arrays that it computed.

Plain RoPE, one and all heads of keys and values, and RoPE scaled by parts, on NTK's base or without. What remains is
its norm, which adds epsilon to the root mean square instead of its square (docs/departures.md).
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from llmq_jax.interop import to_state_dict
from llmq_jax.layers.norms import NORMS
from llmq_jax.layers.positions import ByPartsNTKRope, ByPartsRope, Rope
from tests.parity.golden import LOGITS, Golden
from tests.parity.gradients import assert_same_gradients

NAMES = ("llama3", "llama3_mqa", "llama3_mha", "llama3_bypart_only", "llama3_yarn_ntk")


def fields(meta):
    """What the weights do not tell: the context and RoPE."""
    rope = {"rope_theta": float(meta["cfg"]["rope_base"])}
    if scaling := meta.get("rope_scaling"):
        rope |= {"rope_type": "by_parts", "original_max_position_embeddings": scaling["og_ctx_len"]}
        rope |= {name: scaling[name] for name in ("factor", "alpha", "beta")}
        if meta["ntk_aware"]:
            rope |= {"rope_type": "by_parts_ntk", "ntk_factor": scaling["ctx_len"] / scaling["og_ctx_len"]}
    return {"max_position_embeddings": meta["cfg"]["context_length"], "rope_parameters": rope}


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return Golden(request.param, fields=fields)


def test_the_config_is_theirs(golden):
    theirs, ours = golden.meta["cfg"], golden.config
    assert ours.vocab_size == theirs["vocab_size"]
    assert ours.hidden_size == theirs["emb_dim"]
    assert ours.num_hidden_layers == theirs["n_layers"]
    assert ours.key_value_heads == theirs["num_kv_groups"]
    assert ours.intermediate_size == theirs["hidden_dim"]
    assert ours.rms_norm_eps == 1e-5
    assert ours.tie_word_embeddings and ours.attention_output_bias and not ours.attention_bias
    rope = Rope
    if golden.meta.get("rope_scaling"):
        rope = ByPartsNTKRope if golden.meta["ntk_aware"] else ByPartsRope
    assert type(ours.rope_parameters) is rope


def test_logits_and_hidden_states(golden):
    assert golden["out/logits"].std() > 0.5, "logits this flat would hide a fault"
    assert golden.difference() < LOGITS
    model, tokens = golden.lm.model, jnp.asarray(golden["in/x"])
    context = model.context(jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1)))
    outside, layers = model.slice_layers(golden.lm.variables)
    (group,) = model.layer_groups()
    (block,) = group.blocks
    x = model.apply(outside, tokens, context.positions, method="embed")
    for number, layer in enumerate(layers):
        x, _, _ = block(parent=None).apply(layer, x, context)
        np.testing.assert_allclose(x, golden[f"out/hidden/block{number}"], rtol=0, atol=LOGITS)


class EpsilonOutsideTheRoot(nn.Module):
    """The original's RMSNorm."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return scale * x / (jnp.sqrt(jnp.square(x).mean(-1, keepdims=True)) + self.epsilon)


def test_what_remains_is_the_epsilon(golden, monkeypatch):
    with_ours = golden.difference()
    monkeypatch.setitem(NORMS, "rms_norm", EpsilonOutsideTheRoot)
    with_theirs = golden.difference()
    assert with_theirs < 1e-5
    assert with_ours > 2 * with_theirs


@pytest.mark.parametrize(
    ("norm", "loss_tolerance", "tolerance"), [("ours", LOGITS, 1e-4), ("theirs", 1e-5, 1e-5)], ids=["ours", "theirs"]
)
@pytest.mark.product
def test_loss_and_gradients(golden, norm, loss_tolerance, tolerance, monkeypatch):
    if norm == "theirs":
        monkeypatch.setitem(NORMS, "rms_norm", EpsilonOutsideTheRoot)
    loss, ours = golden.loss_and_gradients()
    assert abs(loss - float(golden["out/loss"])) < loss_tolerance
    assert_same_gradients(ours, golden.under("grad/"), tolerance)


def test_weights_go_back_as_they_came(golden):
    exported = to_state_dict(golden.lm.variables, golden.config, "original")
    buffers = {"mask", "cos", "sin"}
    assert exported.keys() == golden.state.keys() - buffers
    for name, array in exported.items():
        np.testing.assert_array_equal(array, golden.state[name], err_msg=name)
