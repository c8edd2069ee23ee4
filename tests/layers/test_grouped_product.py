"""Kernels for GPUs, interpreted on a CPU, beside plain products: values and gradients."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from llmq_jax.errors import BadInput
from llmq_jax.layers import expert_dispatch, grouped_product
from llmq_jax.layers.grouped_product import grouped_product as product

# sizes, rows behind all groups, K, N
CASES = {
    "several tiles and steps, a rest, an empty group": ((130, 0, 150), 20, 192, 160),
    "widths that need padding": ((5, 9), 2, 10, 6),
    "few rows, many groups": ((0, 1, 0, 0, 2, 0, 0, 0, 1), 0, 32, 64),
    "no row of any group": ((0, 0), 3, 16, 16),
    "as many tiles as there can be": ((33, 1, 1), 1, 16, 16),
}


@jax.jit
def with_gradients(rows, matrices, sizes, grad):
    out, pull_back = jax.vjp(lambda rows, matrices: product(rows, matrices, sizes), rows, matrices)
    return out, *pull_back(grad)


def draw(sizes, rest, depth, width, dtype=np.float32):
    rng = np.random.default_rng(0)
    count = sum(sizes) + rest
    shapes = (count, depth), (len(sizes), depth, width), (count, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients_are_those_of_each_group(case):
    sizes = CASES[case][0]
    rows, matrices, grad = draw(*CASES[case])
    # What belongs to no group may hold anything.
    holes = jnp.arange(len(rows))[:, None] >= sum(sizes)
    found = with_gradients(jnp.where(holes, jnp.nan, rows), matrices, jnp.array(sizes), grad)
    expected = np.zeros(grad.shape), np.zeros(rows.shape), np.zeros(matrices.shape)
    ends = np.cumsum(sizes)
    for group, part in enumerate(map(slice, ends - sizes, ends)):
        x, w, g = (np.asarray(leaf, np.float64) for leaf in (rows[part], matrices[group], grad[part]))
        expected[0][part], expected[1][part], expected[2][group] = x @ w, g @ w.T, x.T @ g
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_gradients_in_bfloat16_add_up_in_float32():
    rows, matrices, grad = draw((700,), 0, 16, 16, jnp.bfloat16)
    rows, grad = abs(rows), abs(grad)
    _, _, found = with_gradients(rows, matrices, jnp.array([700]), grad)
    exact = np.asarray(rows, np.float64).T @ np.asarray(grad, np.float64)
    assert (found[0] == jnp.asarray(exact, jnp.bfloat16)).mean() > 0.99  # all but ties


def test_a_gpu_takes_the_kernels_only_if_they_work_there(monkeypatch, capsys):
    def works(difference):
        monkeypatch.setattr(grouped_product, "_difference", difference)
        grouped_product.works_here.cache_clear()
        return expert_dispatch.choose("auto")

    own = grouped_product._difference
    assert own(16, jnp.bfloat16) < 0.02
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert works(lambda rows, dtype: 0.01) == "grouped"
    assert not capsys.readouterr().err
    assert works(lambda rows, dtype: np.nan if dtype == jnp.float32 else 0.01) == "blocks"
    assert works(lambda rows, dtype: 1 / 0) == "blocks"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "jax.experimental.pallas.triton", None)
        patched.delattr(pallas, "triton")
        assert works(own) == "blocks"  # as with a JAX that has no Triton any more
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(BadInput, match="dispatch='blocks' in all processes"):  # which must run the same program
        works(lambda rows, dtype: 1 / 0)
    grouped_product.works_here.cache_clear()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[1].endswith("'blocks' is taken (ZeroDivisionError: division by zero)")
    assert "'blocks' is taken (ModuleNotFoundError: import of jax.experimental.pallas.triton" in told[2]
