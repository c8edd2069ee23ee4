"""Rows sorted by group times the matrix of their group, for GPUs: one kernel for each product, in Pallas' Triton.

After Gale et al. 2022, MegaBlocks, arXiv:2211.15841. With rows [A, K] of which the first `sizes[0]` belong to group 0
and so on, and matrices [E, K, N]:

    out[i] = rows[i] @ matrices[group of i]                            products of tiles of rows, each of one group
    gradient of rows: the same, with the matrices transposed
    gradient of matrices[e]: rowsᵀ @ grad over the rows of group e     one loop over these for each tile of the matrix

The work is that of the rows there are, and of at most one more tile a group. Nothing depends on the sizes but what the
kernels read, so that the host never waits for them. Sums are in float32. On other backends Pallas interprets the
kernels: that is for tests.

JAX 0.12 announces that it will drop Pallas' Triton. It is imported where it is used, so that a JAX without it refuses
only these kernels, and `works_here` says so.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import target_platform

# Triton multiplies tiles of at least 16 x 16. Three steps of rows and matrix are in flight at once, 96 KiB of shared
# memory in all, which every GPU since Ampere has.
LEAST, MOST, STEP_BYTES = 16, 128, 128
STAGES = 3


class Tiles(NamedTuple):
    """Where each tile of `length` rows lies, for as many as there may be."""

    group: Int[Array, " tiles"]
    """The group; E is that of rows behind all groups, whose product is 0."""
    start: Int[Array, " tiles"]
    """The first row."""
    left: Int[Array, " tiles"]
    """How many rows the group has from there on; 0: there is no such tile."""


def grouped_product(
    rows: Float[Array, "A K"], matrices: Float[Array, "E K N"], sizes: Int[Array, " E"]
) -> Float[Array, "A N"]:
    """Rows, of which the first `sizes[0]` belong to group 0 and so on, times their group's matrix; rows behind all
    groups give zero."""
    sizes = sizes.astype(jnp.int32)  # kernels count in 32 bits, under JAX_ENABLE_X64 too
    depth, width = (-matrices.shape[axis] % LEAST for axis in (1, 2))
    rows = jnp.pad(rows, ((0, 0), (0, depth)))
    matrices = jnp.pad(matrices, ((0, 0), (0, depth), (0, width)))
    return _product(rows, matrices, sizes)[:, : matrices.shape[2] - width]


@jax.custom_vjp
def _product(rows: Array, matrices: Array, sizes: Array) -> Array:
    return _rows_times(rows, matrices, sizes, transposed=False)


def _forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return _rows_times(rows, matrices, sizes, transposed=False), (rows, matrices, sizes)


def _backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, None]:
    # A gradient that nobody wants is one kernel less: XLA leaves it out.
    rows, matrices, sizes = saved
    return _rows_times(grad, matrices, sizes, transposed=True), _by_group(rows, grad, sizes, matrices.dtype), None


_product.defvjp(_forward, _backward)


def tiles_of(sizes: Int[Array, " E"], rows: int, length: int) -> Tiles:
    """All tiles of `rows` rows."""
    sizes = jnp.append(sizes, rows - sizes.sum())
    ends, tiles = jnp.cumsum(sizes), -(-sizes // length)
    last = jnp.cumsum(tiles)
    index = jnp.arange(rows // length + min(len(sizes), rows))
    group = (index[:, None] >= last).sum(1)  # past the last tile: the number of groups
    found = jnp.minimum(group, len(sizes) - 1)
    start = (ends - sizes)[found] + (index - (last - tiles)[found]) * length
    return Tiles(found, start, jnp.where(group < len(sizes), ends[found] - start, 0))


def _tile_length(rows: int, groups: int) -> int:
    """A power of two near an average group's size."""
    return min(max(pl.next_power_of_2(-(-rows // groups)), LEAST), MOST)


def _rows_times(rows: Array, matrices: Array, sizes: Array, *, transposed: bool) -> Array:
    from jax.experimental.pallas import triton

    groups = len(matrices)
    depth, width = matrices.shape[:0:-1] if transposed else matrices.shape[1:]
    length = _tile_length(len(rows), groups)
    # Few rows: weights are what is read, by many narrow tiles at once.
    columns = gcd(width, MOST if length > 2 * LEAST else 2 * LEAST)
    step = gcd(depth, STEP_BYTES // rows.dtype.itemsize)
    tiles = tiles_of(sizes, len(rows), length)
    across = width // columns

    def kernel(group_of: Any, start_of: Any, left_of: Any, rows: Any, matrices: Any, out: Any) -> None:
        # Tiles that run at the same time are neighbours, and share rows and a matrix in the cache.
        tile, column = pl.program_id(0) // across, pl.program_id(0) % across * columns
        group, start, left = group_of[tile], start_of[tile], left_of[tile]
        real = (jnp.arange(length) < left)[:, None]

        def add(i: Array, total: Array) -> Array:
            inner, outer = pl.ds(i * step, step), pl.ds(column, columns)
            part = triton.load(rows.at[pl.ds(start, length), inner], mask=real, other=0)
            matrix = matrices[group, outer, inner].T if transposed else matrices[group, inner, outer]
            return total + jnp.dot(part, matrix, preferred_element_type=jnp.float32)

        @pl.when(left > 0)
        def _() -> None:
            steps = (group < groups).astype(jnp.int32) * (depth // step)
            total = jax.lax.fori_loop(0, steps, add, jnp.zeros((length, columns), jnp.float32))
            place = out.at[pl.ds(start, length), pl.ds(column, columns)]
            triton.store(place, total.astype(out.dtype), mask=real)

    shape = jax.ShapeDtypeStruct((len(rows), width), rows.dtype)
    return _call(kernel, shape, len(tiles.group) * across, length)(*tiles, rows, matrices)


def _by_group(rows: Array, grad: Array, sizes: Array, dtype: Any) -> Array:
    """[E, K, N]: for each group, its rows transposed times their gradients."""
    from jax.experimental.pallas import triton

    depth, width = rows.shape[1], grad.shape[1]
    high, wide = gcd(depth, MOST), gcd(width, MOST)
    step = min(_tile_length(len(rows), len(sizes)), STEP_BYTES // rows.dtype.itemsize)
    down, across = depth // high, width // wide
    ends = jnp.cumsum(sizes)

    def kernel(start_of: Any, end_of: Any, rows: Any, grad: Any, out: Any) -> None:
        index = pl.program_id(0)
        group, row, column = index // (down * across), index // across % down * high, index % across * wide
        start, end = start_of[group], end_of[group]

        def add(i: Array, total: Array) -> Array:
            first = start + i * step
            real, these = (first + jnp.arange(step) < end)[:, None], pl.ds(first, step)
            part = triton.load(rows.at[these, pl.ds(row, high)], mask=real, other=0)
            gradient = triton.load(grad.at[these, pl.ds(column, wide)], mask=real, other=0)
            return total + jnp.dot(part.T, gradient, preferred_element_type=jnp.float32)

        total = jax.lax.fori_loop(0, pl.cdiv(end - start, step), add, jnp.zeros((high, wide), jnp.float32))
        out[group, pl.ds(row, high), pl.ds(column, wide)] = total.astype(out.dtype)

    shape = jax.ShapeDtypeStruct((len(sizes), depth, width), dtype)
    return _call(kernel, shape, len(sizes) * down * across, high)(ends - sizes, ends, rows, grad)


def _call(kernel: Any, shape: Any, programs: int, length: int) -> Callable[..., Array]:
    """`length`: the height of a tile."""
    from jax.experimental.pallas import triton

    on_gpu = target_platform() == "gpu"
    parameters = triton.CompilerParams(num_warps=8 if length == MOST else 4, num_stages=STAGES)
    call: Callable[..., Array] = pl.pallas_call(
        kernel, out_shape=shape, grid=(programs,), compiler_params=parameters, interpret=not on_gpu
    )
    return call


@cache
def works_here() -> bool:
    """Whether the kernels compile for this process's GPU and give what plain products do, gradients too; if not, a line
    on standard error says so. BadInput in one process of several, whose programs have to be the same."""

    def greatest() -> float:
        # Tiles of 16 rows, 32 and 128. NumPy's maximum of numbers and NaN is NaN, unlike Python's.
        differences = [_difference(rows, jnp.bfloat16) for rows in (8, 90, 512)]
        return float(np.max([*differences, _difference(512, jnp.float32)]))

    try:
        with ThreadPoolExecutor(1) as alone:  # a thread of its own has no mesh, and traces no program
            wrong = alone.submit(greatest).result()
        reason = None if wrong < 0.05 else f"they are off by {wrong:.2g}"
    except Exception as error:  # of any kind: compilers have many
        reason = f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]
    if reason is None:
        return True
    fault = "the kernels for experts do not work on this GPU"
    if jax.process_count() > 1:
        raise BadInput(f"{fault}; give experts dispatch='blocks' in all processes ({reason})")
    print(f"{fault}; 'blocks' is taken ({reason})", file=sys.stderr)
    return False


def _difference(count: int, dtype: Any) -> float:
    """How far product and gradients are from plain ones, as a share of the greatest entry."""
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 4, count))  # 3 is none
    arrays = [rng.normal(size=size).astype(dtype) for size in ((count, 256), (3, 256, 128), (count, 128))]

    def plain(rows: Array, matrices: Array) -> Array:
        return jnp.einsum("ak,ekn,ae->an", rows, matrices, jax.nn.one_hot(groups, 3, dtype=dtype))

    def grouped(rows: Array, matrices: Array) -> Array:
        return grouped_product(rows, matrices, jnp.bincount(groups, length=3))

    def with_gradients(rows: Array, matrices: Array, grad: Array) -> list[tuple[Array, ...]]:
        results = [jax.vjp(function, rows, matrices) for function in (plain, grouped)]
        return [(out, *pull_back(grad)) for out, pull_back in results]

    expected, found = jax.device_get(jax.jit(with_gradients)(*arrays))
    pairs = [(np.float32(a), np.float32(b)) for a, b in zip(expected, found, strict=True)]
    return float(np.max([np.abs(a - b).max() / np.abs(a).max() for a, b in pairs]))
