"""How arrays in bfloat16 are handed to XLA's CPU backend, which by itself takes longer for them than for float32.

Processors with AMX multiply bfloat16 several times as fast as float32. XLA has such products, but takes them only where
the result is in float32, the last axis of the first operand is contracted, and there are two rows or more; it converts
the operands of all others to float32. It does so, too, with whole arrays of which one part is read or written: the
stack of which a layer takes its weights, the cache in which a token puts its keys. (Measured with AMX; without it only
the row smollm2-bfloat16-step-2048 of docs/benchmarks.md. Products in bfloat16 are taken on any processor, with whatever
instructions XLA's library has for it.)

Here JAX's lowering rules for these operations, by which a traced program becomes XLA's, are replaced for bfloat16 on a
CPU. What is written, traced, differentiated and planned stays the same, and layers of one's own gain as well. Values
do not change but for the order in which products are summed, in float32 as before.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

Axes = tuple[int, ...]
Dimensions = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]
"""As `lax.dot_general` has them: the contracted axes of both operands, and their batch axes."""


def product(lhs: jax.Array, rhs: jax.Array, dimensions: Dimensions) -> jax.Array:
    """`lax.dot_general` of arrays in bfloat16, with a result in float32, in a form that XLA computes in bfloat16."""
    (contracted, rhs_contracted), (batch, rhs_batch) = dimensions
    rows = _rows(lhs, contracted, batch)
    lhs = transposed(lhs, (*batch, *rows, *contracted))
    if math.prod(lhs.shape[: len(batch) + len(rows)]) > 1:
        contracted, batch = tuple(range(len(batch) + len(rows), lhs.ndim)), tuple(range(len(batch)))
        return _product(lhs, rhs, ((contracted, rhs_contracted), (batch, rhs_batch)))
    # The only row becomes the second operand, with a row of zeros beside it.
    two = jnp.pad(lhs.reshape(1, *lhs.shape[len(rows) :]), [(0, 1), *((0, 0) for _ in contracted)])
    found = _product(rhs, two, ((rhs_contracted, tuple(range(1, two.ndim))), ((), ())))[..., 0]
    return found.reshape(*lhs.shape[: len(rows)], *found.shape)


_product = partial(lax.dot_general, preferred_element_type=jnp.float32)


def transposed(x: jax.Array, order: Axes) -> jax.Array:
    """x with its axes in this order, in memory. XLA moves a mere transposition into the product that reads it, but not
    one between two reshapes. So an axis of even size is cut in two, and joined again after it. With x [6, 5]:

        x.T @ w                                                    becomes a product over the first axis of x
        x.reshape(2, 3, 5).transpose(2, 0, 1).reshape(5, 6) @ w    the same values, and it stays as it is
    """
    if order == tuple(range(x.ndim)):
        return x
    cut = next(axis for axis in order if x.shape[axis] % 2 == 0)
    # Into halves, which a mesh that divides the axis can follow.
    parts = x.reshape(*x.shape[:cut], 2, x.shape[cut] // 2, *x.shape[cut + 1 :])
    places = [place for axis in order for place in ((cut, cut + 1) if axis == cut else (axis + (axis > cut),))]
    return parts.transpose(places).reshape([x.shape[axis] for axis in order])


def _rows(x: Any, contracted: Sequence[int], batch: Sequence[int]) -> Axes:
    """The axes that are neither contracted nor of the batch."""
    return tuple(axis for axis in range(x.ndim) if axis not in (*contracted, *batch))


def _is_canonical(x: Any, contracted: Axes, batch: Axes) -> bool:
    """Whether axes of the batch come first, and those that are contracted last."""
    return (*batch, *_rows(x, contracted, batch), *contracted) == tuple(range(x.ndim))


def _lower_product(own: mlir.LoweringRule, context: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    (left, right), (out,) = context.avals_in, context.avals_out
    dimensions = (contracted, rhs_contracted), (batch, rhs_batch) = params["dimension_numbers"]
    rows = [left.shape[axis] for axis in _rows(left, contracted, batch)]
    canonical = _is_canonical(left, contracted, batch)
    if (
        not left.dtype == right.dtype == jnp.bfloat16
        or out.dtype not in (jnp.bfloat16, jnp.float32)
        or not all(isinstance(size, int) and size > 0 for size in (*left.shape, *right.shape))
        or not (canonical or any(size % 2 == 0 for size in left.shape))
        or isinstance(params["precision"], lax.DotAlgorithm | lax.DotAlgorithmPreset)
        or any(axis is not None for x in (left, right, out) for axis in x.sharding.spec)  # of a mesh with explicit axes
    ):
        return own(context, lhs, rhs, **params)
    if math.prod(rows) == 1:
        columns = math.prod(right.shape[axis] for axis in _rows(right, rhs_contracted, rhs_batch))
        # Otherwise XLA's own are faster, or may be: the matrix may be a transposed one, which is not seen here.
        if batch or columns == 1 or not _is_canonical(right, rhs_contracted, ()):
            return own(context, lhs, rhs, **params)
    elif canonical and out.dtype == jnp.float32:
        # As XLA takes it. It decides so early, and a transposition that moves into the product later (through
        # `jnp.where`, for instance) would leave one that it cannot compute: the barrier keeps it out.
        barrier = mlir.lower_fun(lax.optimization_barrier, multiple_results=False)
        (lhs,) = barrier(context.replace(avals_in=[left], avals_out=[left]), lhs)
        return own(context, lhs, rhs, **params)
    lower = mlir.lower_fun(lambda lhs, rhs: product(lhs, rhs, dimensions).astype(out.dtype), multiple_results=False)
    return lower(context, lhs, rhs)


def _lower_move(
    own: mlir.LoweringRule, move: Callable[..., Any], reads: bool, context: Any, *operands: Any, **params: Any
) -> Any:
    """An operation that only moves numbers is done on their bits."""
    # A gather that fills in numbers is lowered to one that does not, and comes here again.
    fills = params.get("mode") == lax.GatherScatterMode.FILL_OR_DROP and "fill_value" in params
    update = params.get("update_jaxpr")  # of a scatter: what is put in a place, of what stands there and an update
    computes = update is not None and (update.eqns or update.outvars != update.invars[1:])
    if context.avals_in[0].dtype != jnp.bfloat16 or fills or computes:
        return own(context, *operands, **params)

    def on_bits(*operands: jax.Array) -> jax.Array:
        if reads:
            # In a loop, XLA would take the bits of a whole table or stack before it, as a copy. What ties it to the
            # indices, which the loop changes, keeps them inside, where the bits are those of what is read.
            operands = lax.optimization_barrier(operands)
        bits = [lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x for x in operands]
        return lax.bitcast_convert_type(move(*bits, **params), jnp.bfloat16)

    return mlir.lower_fun(on_bits, multiple_results=False)(context, *operands)


def _scatter(x: jax.Array, indices: Any, parts: Any, *, update_jaxpr: Any, update_consts: Any, **params: Any) -> Any:
    return lax.scatter(x, indices, parts, **params)  # which makes its own `update_jaxpr`, of the type of x


def _replace_rules() -> None:
    try:  # JAX has no public name for the rule of its own that is used where nothing is gained
        by_primitive = mlir._lowerings | mlir._platform_specific_lowerings["cpu"]
        own = {primitive: by_primitive[primitive].rule for primitive in (lax.dot_general_p, *MOVES)}
    except (AttributeError, KeyError):
        return  # in a later JAX perhaps: bfloat16 is slow then, and tests/layers/test_bfloat16_on_cpu.py fails
    mlir.register_lowering(lax.dot_general_p, partial(_lower_product, own[lax.dot_general_p]), platform="cpu")
    for primitive, move in MOVES.items():
        reads = primitive in (lax.dynamic_slice_p, lax.gather_p)
        mlir.register_lowering(primitive, partial(_lower_move, own[primitive], move, reads), platform="cpu")


MOVES: dict[Primitive, Callable[..., Any]] = {
    lax.dynamic_slice_p: lax.dynamic_slice_p.bind,
    lax.dynamic_update_slice_p: lax.dynamic_update_slice_p.bind,
    lax.gather_p: lax.gather_p.bind,
    lax.scatter_p: _scatter,
}
_replace_rules()
