"""Experts by blocks: rows sorted by expert are cut into blocks of one expert each, and a loop runs over these blocks.
The work grows with the rows, not with the experts (after Gale et al. 2022, MegaBlocks, arXiv:2211.15841).

A block is up to twice as long as an expert's mean load (but up to 128 rows at least, and 1,024 at most), so that most
experts are one long product for each of their matrices. The backward pass is written by hand: gradients of experts add
up in place, and those of frozen weights are never computed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from llmq_jax.layers.expert_weights import WEIGHTS, Activation, ExpertWeights, through_adapter
from llmq_jax.layers.recomputation import kept

# The length of a block is one of BLOCK_STEPS times a step, which is about 1 / STEPS_OF_MEAN of an expert's mean load.
# The half steps around that mean (4) let most experts fit into one block with little padding. Steps are multiples of
# SHORTEST_STEP, which suits matrix products, and at most LONGEST_STEP, beyond which these get no faster.
BLOCK_STEPS, STEPS_OF_MEAN, SHORTEST_STEP, LONGEST_STEP = (1, 2, 3, 3.5, 4, 4.5, 5, 6, 8), 4, 16, 128


def block_lengths(assignments: int, num_experts: int) -> tuple[int, ...]:
    """The lengths, in rows, that blocks of `in_blocks` may have, ascending."""
    wanted = -(-assignments // (num_experts * STEPS_OF_MEAN * SHORTEST_STEP)) * SHORTEST_STEP
    step = min(wanted, LONGEST_STEP)
    return tuple(dict.fromkeys(min(int(step * count), assignments) for count in BLOCK_STEPS))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def in_blocks(
    rows: Float[Array, "A D"],
    experts: ExpertWeights,
    sizes: Int[Array, " E"],
    activation: Activation,
    lengths: tuple[int, ...],
) -> Float[Array, "A D"]:
    """Pass rows sorted by expert, `sizes[e]` of them for expert e, through their experts; rows after these give zero.

    An expert's rows are cut into blocks of the greatest length; the remainder gets the shortest block that holds it.
    That block may read into the next expert's rows, and its output, padded to the greatest length, covers theirs:
    blocks run in order, so that the next one overwrites it. Weights are read block by block, those of idle experts
    never.
    """
    return _through_blocks(rows, experts, sizes, activation, lengths)[0]


def _plan(sizes: Int[Array, " E"], rows: int, lengths: tuple[int, ...]) -> tuple[Array, dict[str, Array]]:
    """(the number of blocks; for each of the most blocks that there may be: its expert, the index of its length, its
    first row, the number of its own rows)."""
    longest = lengths[-1]
    blocks = -(-sizes // longest)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(rows // longest + len(sizes))
    expert = jnp.minimum(jnp.searchsorted(ends, index, side="right"), len(sizes) - 1)
    before = (index - (ends - blocks)[expert]) * longest
    real = sizes[expert] - before
    return ends[-1], {
        "expert": expert,
        "length": jnp.minimum(jnp.searchsorted(jnp.array(lengths), real), len(lengths) - 1),
        "start": (jnp.cumsum(sizes) - sizes)[expert] + before,
        "real": real,
    }


def _blocks_forward(
    rows: Any, experts: Any, sizes: Any, activation: Activation, lengths: tuple[int, ...]
) -> tuple[Array, tuple[Any, ...]]:
    """With `symbolic_zeros` arguments come as (value, perturbed): frozen weights are not perturbed, and no gradient is
    computed for them."""
    learns = {
        name: getattr(experts, name)
        for name in WEIGHTS
        if any(leaf.perturbed for leaf in jax.tree.leaves(getattr(experts, name), is_leaf=_is_marked))
    }
    rows, experts, sizes, learns = jax.tree.map(
        lambda leaf: leaf.value, (rows, experts, sizes, learns), is_leaf=_is_marked
    )
    mixed, saved = _through_blocks(rows, experts, sizes, activation, lengths)
    return mixed, (*saved, learns)


def _is_marked(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _through_blocks(
    rows: Array, experts: ExpertWeights, sizes: Array, activation: Activation, lengths: tuple[int, ...]
) -> tuple[Array, tuple[Any, ...]]:
    count, plan = kept(_plan(sizes, len(rows), lengths))
    longest = lengths[-1]
    padded = jnp.pad(rows, ((0, longest), (0, 0)))
    parts, hidden = experts.up.shape[2:]
    by_length = [partial(_block_forward, activation=activation, length=n, longest=longest) for n in lengths]

    def one_block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        preactivations, mixed = carry
        block = jax.tree.map(lambda leaf: leaf[i], plan)
        up, down = jax.lax.switch(block["length"], by_length, block, padded, experts)
        return _put(preactivations, up, block["start"]), _put(mixed, down, block["start"])

    empty = jnp.zeros((len(padded), parts * hidden), rows.dtype), jnp.zeros_like(padded)
    preactivations, mixed = kept(jax.lax.fori_loop(0, count, one_block, empty))
    mixed = jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], mixed[: len(rows)], 0)
    return mixed, (padded, preactivations, experts, count, plan)


def _block_forward(
    block: dict[str, Array],
    padded: Array,
    experts: ExpertWeights,
    *,
    activation: Activation,
    length: int,
    longest: int,
) -> tuple[Float[Array, "longest _"], Float[Array, "longest D"]]:
    """(pre-activations, the expert's outputs) of a block of `length` rows, both padded to the longest."""
    width, parts, hidden = experts.up.shape[1:]
    expert, start = block["expert"], block["start"]
    rows = _cut(padded, start, length)
    up = rows @ experts.up[expert].reshape(width, parts * hidden)
    if experts.up_low_rank is not None:
        up += through_adapter(rows, experts.up_low_rank, expert)
    if experts.up_bias is not None:
        up += experts.up_bias[expert].reshape(-1)
    activated = activation(up.reshape(length, parts, hidden))
    down = activated @ experts.down[expert]
    if experts.down_low_rank is not None:
        down += through_adapter(activated, experts.down_low_rank, expert)
    if experts.down_bias is not None:
        down += experts.down_bias[expert]
    return _lengthened(up, longest), _lengthened(down, longest)


def _blocks_backward(
    activation: Activation, lengths: tuple[int, ...], saved: tuple[Any, ...], grad: Any
) -> tuple[Array, ExpertWeights, None]:
    padded, preactivations, experts, count, plan, learns = saved
    longest = lengths[-1]
    grad = jnp.zeros_like(padded) if isinstance(grad, SymbolicZero) else jnp.pad(grad, ((0, longest), (0, 0)))
    options: dict[str, Any] = {"activation": activation, "learns": tuple(learns), "longest": longest}
    by_length = [partial(_block_gradients, length=n, **options) for n in lengths]

    def one_block(i: Array, carry: tuple[Array, dict[str, Any]]) -> tuple[Array, dict[str, Any]]:
        row_grad, weights_grad = carry
        block = jax.tree.map(lambda leaf: leaf[i], plan)
        back, own = jax.lax.switch(block["length"], by_length, block, padded, preactivations, grad, experts)
        weights_grad = jax.tree.map(lambda total, part: total.at[block["expert"]].add(part), weights_grad, own)
        return _put(row_grad, back, block["start"]), weights_grad

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), learns)
    row_grad, weights_grad = jax.lax.fori_loop(0, count, one_block, (jnp.zeros_like(padded), zeros))
    weights_grad = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), weights_grad, learns)
    return row_grad[:-longest], ExpertWeights(**dict.fromkeys(WEIGHTS) | weights_grad), None


def _block_gradients(
    block: dict[str, Array],
    padded: Array,
    preactivations: Array,
    grad: Array,
    experts: ExpertWeights,
    *,
    activation: Activation,
    learns: Sequence[str],
    length: int,
    longest: int,
) -> tuple[Float[Array, "longest D"], dict[str, Any]]:
    """(gradient of a block's rows, padded to the longest; gradients of the weights named in `learns`, in float32)."""
    width, parts, hidden = experts.up.shape[1:]
    expert, start = block["expert"], block["start"]
    real = (jnp.arange(length) < block["real"])[:, None]
    down_grad = jnp.where(real, _cut(grad, start, length), 0)
    activated, pull_back = jax.vjp(activation, _cut(preactivations, start, length).reshape(length, parts, hidden))
    # grad Wᵀ, formed as (W gradᵀ)ᵀ: XLA then transposes the small arrays, not W.
    activated_grad = (experts.down[expert] @ down_grad.T).T
    own: dict[str, Any] = {}
    if "down" in learns:
        own["down"] = _product(activated.T, down_grad)
    if experts.down_low_rank is not None:
        own["down_low_rank"], back = _adapter_gradients(activated, down_grad, experts.down_low_rank, expert)
        activated_grad += back
    if "down_bias" in learns:
        own["down_bias"] = down_grad.sum(0, dtype=jnp.float32)
    up_grad = pull_back(activated_grad)[0].reshape(length, parts * hidden)
    rows = _cut(padded, start, length)
    row_grad = (experts.up[expert].reshape(width, parts * hidden) @ up_grad.T).T
    if "up" in learns:
        own["up"] = _product(rows.T, up_grad).reshape(width, parts, hidden)
    if experts.up_low_rank is not None:
        own["up_low_rank"], back = _adapter_gradients(rows, up_grad, experts.up_low_rank, expert)
        row_grad += back
    if "up_bias" in learns:
        own["up_bias"] = up_grad.sum(0, dtype=jnp.float32).reshape(parts, hidden)
    return _lengthened(row_grad, longest), {name: own[name] for name in learns}


in_blocks.defvjp(_blocks_forward, _blocks_backward, symbolic_zeros=True)


def _cut(x: Float[Array, "A D"], start: Int[Array, ""], size: int) -> Float[Array, "size D"]:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _put(x: Float[Array, "A D"], rows: Float[Array, "size D"], start: Int[Array, ""]) -> Float[Array, "A D"]:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _lengthened(x: Float[Array, "size D"], length: int) -> Float[Array, "length D"]:
    return jnp.pad(x, ((0, length - len(x)), (0, 0)))


def _adapter_gradients(
    rows: Float[Array, "M D"], grad: Float[Array, "M F"], pair: tuple[Array, Array], expert: Int[Array, ""]
) -> tuple[tuple[Array, Array], Float[Array, "M D"]]:
    """The gradients of an expert's adapter, and of the rows that went through it."""
    first, last = (leaf[expert] for leaf in pair)
    low_grad = grad @ last.reshape(last.shape[0], -1).T
    # Both as products of R rows, as in `lora.raised`.
    own = _product(low_grad.T, rows).T, _product((rows @ first).T, grad).reshape(last.shape)
    return own, low_grad @ first.T


def _product(a: Float[Array, "i j"], b: Float[Array, "j l"]) -> Float[Array, "i l"]:
    """In float32: the gradients of many blocks add up."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
