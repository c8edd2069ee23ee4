"""Layers against their PyTorch counterparts, values and gradients, at ordinary and at tiny magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmq_jax.interop.configs import ACTIVATION_SPELLINGS
from llmq_jax.layers.activations import ACTIVATIONS, silu
from llmq_jax.layers.linear import Linear
from llmq_jax.layers.norms import DyT, LayerNorm, RMSNorm
from tests.parity.golden import read_golden


@pytest.mark.parametrize("magnitude", [1.0, 5e-3])
def test_layer_norm(magnitude):
    rng = np.random.default_rng(0)
    x = magnitude * rng.normal(size=(3, 5, 16)).astype(np.float32)
    scale, bias, grad = (rng.normal(size=shape).astype(np.float32) for shape in ((16,), (16,), x.shape))

    theirs = torch.nn.LayerNorm(16, eps=1e-5)
    theirs.load_state_dict({"weight": torch.tensor(scale), "bias": torch.tensor(bias)})
    torch_x = torch.tensor(x, requires_grad=True)
    torch_y = theirs(torch_x)
    torch_y.backward(torch.tensor(grad))

    variables = {"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}
    y, pull_back = jax.vjp(lambda x, v: LayerNorm(1e-5).apply(v, x), jnp.asarray(x), variables)
    x_grad, grads = pull_back(jnp.asarray(grad))

    np.testing.assert_allclose(y, torch_y.detach(), atol=1e-5)
    np.testing.assert_allclose(x_grad, torch_x.grad, rtol=1e-4, atol=1e-5 / magnitude)
    np.testing.assert_allclose(grads["params"]["scale"], theirs.weight.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["params"]["bias"], theirs.bias.grad, rtol=1e-4, atol=1e-5)


def test_silu_of_a_large_negative_number_has_a_gradient():
    assert jax.grad(silu)(-200.0) == 0.0


@pytest.mark.parametrize("magnitude", [1.0, 5e-3])
def test_rms_norm(magnitude):
    rng = np.random.default_rng(0)
    x = magnitude * rng.normal(size=(3, 5, 16)).astype(np.float32)
    scale, grad = (rng.normal(size=shape).astype(np.float32) for shape in ((16,), x.shape))

    theirs = torch.nn.RMSNorm(16, eps=1e-5)
    theirs.load_state_dict({"weight": torch.tensor(scale)})
    torch_x = torch.tensor(x, requires_grad=True)
    torch_y = theirs(torch_x)
    torch_y.backward(torch.tensor(grad))

    variables = {"params": {"scale": jnp.asarray(scale)}}
    y, pull_back = jax.vjp(lambda x, v: RMSNorm(1e-5).apply(v, x), jnp.asarray(x), variables)
    x_grad, grads = pull_back(jnp.asarray(grad))

    np.testing.assert_allclose(y, torch_y.detach(), atol=1e-5)
    np.testing.assert_allclose(x_grad, torch_x.grad, rtol=1e-4, atol=1e-5 / magnitude)
    np.testing.assert_allclose(grads["params"]["scale"], theirs.weight.grad, rtol=1e-4, atol=1e-5)


def test_rms_norm_rounds_before_it_scales():
    """In bfloat16, as Llama's: torch.nn.RMSNorm rounds once, after the scale, and is another function by a few bits."""
    rng = np.random.default_rng(0)
    x, scale = (rng.normal(size=shape).astype(np.float32) for shape in ((500, 64), (64,)))
    narrow_x, narrow_scale = torch.tensor(x).bfloat16(), torch.tensor(scale).bfloat16()

    def share_of_equal(theirs):
        theirs.load_state_dict({"weight": narrow_scale})
        with torch.no_grad():
            return (ours == theirs(narrow_x).float().numpy()).mean()

    variables = {"params": {"scale": jnp.asarray(scale, jnp.bfloat16)}}
    ours = RMSNorm(1e-5).apply(variables, jnp.asarray(x, jnp.bfloat16))
    assert ours.dtype == jnp.bfloat16
    ours = np.asarray(ours, np.float32)
    assert share_of_equal(LlamaRMSNorm(64, eps=1e-5).bfloat16()) > 0.999
    assert share_of_equal(torch.nn.RMSNorm(64, eps=1e-5).bfloat16()) < 0.9


@pytest.mark.parametrize(("layer", "alpha"), [(LayerNorm(1e-5), {}), (DyT(), {"alpha": jnp.bfloat16(0.7)})])
def test_norms_with_a_bias_round_to_bfloat16_once(layer, alpha):
    rng = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((50, 64), (64,), (64,)))
    variables = {"params": {"scale": scale, "bias": bias, **alpha}}
    wide = layer.apply(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables), x.astype(jnp.float32))
    np.testing.assert_array_equal(layer.apply(variables, x), wide.astype(jnp.bfloat16), strict=True)


def test_dynamic_tanh():
    """Golden arrays of the original repository."""
    golden = {name: jnp.asarray(array) for name, array in read_golden("dyt")[0].items()}
    names = {"scale": "scale", "bias": "shift", "alpha": "alpha"}
    variables = {"params": {ours: golden[f"param/{theirs}"] for ours, theirs in names.items()}}
    y, pull_back = jax.vjp(lambda x, v: DyT().apply(v, x), golden["in/x"], variables)
    _, grads = pull_back(golden["in/cotangent"])
    np.testing.assert_allclose(y, golden["out/y"], atol=2e-6)
    for ours, theirs in names.items():
        expected = golden[f"grad/{theirs}"]
        np.testing.assert_allclose(grads["params"][ours], expected, atol=1e-5 * float(jnp.abs(expected).max()))


# With parameters that are learned, which our networks have no place for.
LEARNED = {"prelu", "xielu"}


@pytest.mark.parametrize("name", sorted(set(ACT2CLS) - LEARNED))
def test_activations(name):
    """All of transformers', by its names; at 0 and at their other corners too, where a gradient is a convention."""
    ours = ACTIVATIONS[ACTIVATION_SPELLINGS.get(name, name)]
    x = np.append(np.linspace(-12, 12, 4001, dtype=np.float32), np.float32([-3, 0, 3, 6]))
    torch_x = torch.tensor(x, requires_grad=True)
    torch_y = ACT2FN[name](torch_x)
    torch_y.sum().backward()
    np.testing.assert_allclose(ours(jnp.asarray(x)), torch_y.detach(), atol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(jnp.asarray(x)), torch_x.grad, atol=1e-5)
    assert ours(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_linear_with_several_feature_axes():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    kernel, bias = rng.normal(size=(8, 3, 2, 5)).astype(np.float32), rng.normal(size=(3, 2, 5)).astype(np.float32)
    variables = {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    ours = Linear((3, 2, 5)).apply(variables, jnp.asarray(x))
    theirs = torch.nn.functional.linear(
        torch.tensor(x), torch.tensor(kernel.reshape(8, 30).T.copy()), torch.tensor(bias.reshape(30))
    )
    np.testing.assert_allclose(ours.reshape(2, 3, 30), theirs, atol=1e-5)
