"""Layers against their PyTorch counterparts, values and gradients, at ordinary and at tiny magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmq_jax.layers.activations import gelu_exact, gelu_tanh
from llmq_jax.layers.linear import Linear
from llmq_jax.layers.norms import LayerNorm


@pytest.mark.parametrize("magnitude", [1.0, 5e-3])
def test_layer_norm(magnitude):
    rng = np.random.default_rng(0)
    x = magnitude * rng.normal(size=(3, 5, 16)).astype(np.float32)
    scale, bias, slope = (rng.normal(size=shape).astype(np.float32) for shape in ((16,), (16,), x.shape))

    theirs = torch.nn.LayerNorm(16, eps=1e-5)
    theirs.load_state_dict({"weight": torch.tensor(scale), "bias": torch.tensor(bias)})
    torch_x = torch.tensor(x, requires_grad=True)
    torch_y = theirs(torch_x)
    torch_y.backward(torch.tensor(slope))

    variables = {"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}
    y, pull_back = jax.vjp(lambda x, v: LayerNorm(1e-5).apply(v, x), jnp.asarray(x), variables)
    x_slope, slopes = pull_back(jnp.asarray(slope))

    np.testing.assert_allclose(y, torch_y.detach(), atol=1e-5)
    np.testing.assert_allclose(x_slope, torch_x.grad, rtol=1e-4, atol=1e-5 / magnitude)
    np.testing.assert_allclose(slopes["params"]["scale"], theirs.weight.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slopes["params"]["bias"], theirs.bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ours", "approximate"), [(gelu_tanh, "tanh"), (gelu_exact, "none")])
def test_gelu(ours, approximate):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    torch_x = torch.tensor(x, requires_grad=True)
    torch_y = torch.nn.functional.gelu(torch_x, approximate=approximate)
    torch_y.sum().backward()
    np.testing.assert_allclose(ours(jnp.asarray(x)), torch_y.detach(), atol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(jnp.asarray(x)), torch_x.grad, atol=5e-6)


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
