"""Windowed attention: golden arrays of the original repository, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.layers.attention import Context, self_attention
from llmq_jax.layers.window_attention import window_blocks
from tests.parity.golden import read_golden

CONTEXT = Context(jnp.broadcast_to(jnp.arange(12), (2, 12)))


@pytest.fixture(scope="module")
def golden():
    return read_golden("windows")[0]


@pytest.mark.parametrize("block", ["plain", "masked", 3, 12])
@pytest.mark.parametrize("window", [1, 2, 4, 12, 17])
def test_windows(golden, window, block):
    """The window counts the query's own key, and may be longer than the row. Heads have 6 features."""

    def mix(query, key, value):
        if isinstance(block, str):
            named = CONTEXT.replace(implementation=block)
            return self_attention(query, key, value, named, scale=6**-0.5, window=window)
        options = {"scale": 6**-0.5, "softcap": None, "dropout_rate": 0.0}
        return window_blocks(query, key, value, (CONTEXT.positions, None), block, window, **options)

    mixed, pull = jax.vjp(mix, *(jnp.asarray(golden[f"in/swa/{name}"]) for name in "qkv"))
    np.testing.assert_allclose(mixed, golden[f"out/swa/w{window}"], atol=1e-6)
    for name, grad in zip("qkv", pull(jnp.asarray(golden["in/swa/cotangent"])), strict=True):
        np.testing.assert_allclose(grad, golden[f"grad/swa/w{window}/{name}"], atol=1e-5)
