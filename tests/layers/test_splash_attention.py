"""The kernel of a TPU. Elsewhere Pallas interprets it, slowly: values and gradients are those of the formula. That it
compiles for TPUs is for tests/training/test_compiled_plan.py to show."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.layers.fused_attention import fused_attention
from llmq_jax.layers.scaled_dot_product import attend, visible
from llmq_jax.training.sharding import make_mesh
from tests.devices import with_devices


def draw(heads, length, widths, documents):
    """Queries, keys, values and segments of two rows, with padding at their ends, as of packed documents."""
    rng = np.random.default_rng(length)
    shapes = zip((heads[0], heads[1], heads[1]), (widths[0], *widths), strict=True)
    inputs = [jnp.asarray(rng.standard_normal((2, heads, length, width)), jnp.float32) for heads, width in shapes]
    if not documents:
        return inputs, None
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1)
    segments[0, -3:] = 0
    return inputs, jnp.asarray(segments, jnp.int32)


def compare(inputs, segments, window, softcap):
    """Both functions at the same inputs: (value, gradients) of a sum with unequal weights."""
    batch, heads, length = inputs[0].shape[:3]
    weights = np.random.default_rng(7).standard_normal((batch, heads, length, inputs[2].shape[3]))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = visible(positions, positions, segments, segments, window)

    def measured(mix):
        return jax.jit(jax.value_and_grad(lambda *inputs: (weights * jnp.sin(mix(*inputs))).sum(), (0, 1, 2)))(*inputs)

    found = measured(lambda *x: fused_attention(*x, segments, scale=0.4, window=window, softcap=softcap))
    expected = measured(lambda *x: attend(*x, mask, scale=0.4, softcap=softcap))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "length", "widths", "documents", "window", "softcap"),
    [
        ((4, 2), 37, (8, 8), False, None, None),
        ((4, 1), 300, (24, 16), True, 50, 5.0),  # blocks of 128 that a window skips, values narrower than keys
        ((2, 2), 129, (8, 8), True, 200, None),  # a window as long as the row is none
    ],
)
def test_it_equals_the_formula(heads, length, widths, documents, window, softcap):
    compare(*draw(heads, length, widths, documents), window, softcap)


def on_meshes() -> None:
    """With rows and heads divided, and with fewer heads than devices, which each then compute all."""
    for mesh, heads in (("fsdp=2,tensor=2", (4, 2)), ("tensor=4", (2, 2))):
        with jax.set_mesh(make_mesh(mesh)):
            compare(*draw(heads, 40, (8, 8), True), 9, None)


def test_it_equals_the_formula_on_meshes():
    command = [sys.executable, "-m", "tests.layers.test_splash_attention"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=with_devices(4))
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    on_meshes()
