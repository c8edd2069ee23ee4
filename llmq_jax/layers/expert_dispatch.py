"""Tokens to their experts and back: one call, five implementations that give the same values and gradients.

- dense: every expert on every token; outputs of experts that were not chosen get weight 0. The reference.
- blocks: assignments are sorted by expert and cut into blocks of one expert each; a loop runs over these blocks, so
  that the work grows with the assignments, not with the experts (`layers.expert_blocks`). Nothing is dropped.
- capacity: a fixed number of slots for each expert, filled in the order of the tokens; assignments that find no free
  slot are dropped and counted (GShard, arXiv:2006.16668, section 2.2).
- ragged: `jax.lax.ragged_dot` on the sorted assignments, for which some backends compute every expert on every token.
- grouped: the same by kernels for GPUs (`layers.grouped_product`), whose work grows with the assignments.

On few tokens, as in decoding, these would first copy each expert's matrices out of the stack (blocks) or read every
expert's (dense). Where the matrices lie apart, blocks are not made: a loop over the experts that any token chose reads
just theirs (`layers.experts_apart`).

An assignment is a (token, choice) pair: M tokens with k choices each have A = M · k of them. The id E stands for no
expert (padding): such assignments are sorted last, cost nothing and give zero.

The router's weights act in one of three places: in `dense` in the sum over all experts; in `ragged` and `grouped` on
the hidden units, before the second matrix, so that the weights' gradient needs nothing of what experts give; in
`blocks`, in `capacity` and wherever devices exchange tokens (without their weights) in the sum over a token's experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.layers.axes import target_platform
from llmq_jax.layers.expert_blocks import block_lengths, in_blocks
from llmq_jax.layers.expert_weights import Activation, ExpertWeights
from llmq_jax.layers.experts_apart import through_chosen
from llmq_jax.layers.grouped_product import grouped_product, works_here
from llmq_jax.layers.recomputation import kept
from llmq_jax.layers.repetition import repeated

IMPLEMENTATIONS = ("auto", "dense", "blocks", "capacity", "ragged", "grouped")
AUTOMATIC, ON_GPU = "blocks", "grouped"
"""What "auto" means: on a CPU the fastest, or nearly, from one token to thousands, of 8 experts or 64; on a GPU what
never makes the host wait (docs/moe.md)."""
MOST_APART, MOST_ROWS_APART, LONGEST_PROMPT_APART = 64, 24, 128
"""Up to so many experts lie apart (each takes about 10 ms to compile in each layer), in decoding of so many rows, and
for prompts of so many tokens in all, for which a loop over stacked layers would copy all experts of each."""

Product = Callable[[Float[Array, "A K"], Float[Array, "E K N"], Int[Array, " E"]], Float[Array, "A N"]]


@dataclass(frozen=True)
class Exchange:
    """For devices that own equal parts of the experts, in order; each calls `dispatch` with its tokens and experts."""

    devices: int
    all_to_all: Callable[[Any], Any]
    """On [devices, ...]: part i is sent to device i and replaced by what device i sent here."""


def dispatch(
    x: Float[Array, "M D"],
    ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    experts: ExpertWeights,
    activation: Activation,
    implementation: str = "auto",
    capacity: int | None = None,
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """(Σ over choices of weight · expert(x), the number of dropped assignments).

    A token's choices are different experts. `capacity` is the number of slots per expert. With an `exchange`, ids
    number the experts of all devices, and dropped assignments are counted on the device of their expert.
    """
    name = choose(implementation)
    if isinstance(experts.up, tuple):
        if name != "blocks":
            raise BadInput(f"dispatch={name!r} needs stacked experts, and these lie apart (`by_expert`)")
        return through_chosen(x, ids, weights, experts, activation), jnp.zeros((), jnp.int32)
    if name == "dense":
        if exchange is not None:
            raise BadInput("dispatch='dense' has no exchange: every device would need every expert; take 'blocks'")
        return _dense(x, ids, weights, experts, activation), jnp.zeros((), jnp.int32)

    assignments = ids.size

    def own_experts(rows: Array, ids: Array, sizes: Array, shares: Array | None = None) -> tuple[Array, Array]:
        """Pass rows sorted by expert through this device's experts: (rows, the number of dropped ones)."""
        if name == "blocks":
            # `rows` has room for all devices' assignments; on average as many arrive as this device's tokens have.
            lengths = block_lengths(assignments, len(sizes))
            return in_blocks(rows, experts, sizes, activation, lengths), jnp.zeros((), jnp.int32)
        if name in PRODUCTS:
            return _by_products(rows, experts, sizes, activation, PRODUCTS[name], shares), jnp.zeros((), jnp.int32)
        return _in_slots(rows, ids, experts, sizes, activation, capacity)

    flat = ids.reshape(-1)
    num_experts = experts.up.shape[0] * (1 if exchange is None else exchange.devices)
    order, inverse = _sorted(flat, num_experts)
    rows = _spread(x, order, inverse, ids.shape[1])
    # The id E is out of range and not counted.
    sizes = jnp.bincount(flat, length=num_experts)
    if exchange is None:
        shares = _reorder(weights.reshape(-1, 1), order, inverse) if name in PRODUCTS else None
        mixed, dropped = own_experts(rows, flat[order], sizes, shares)
    else:
        shares = None
        room = len(ids) * min(ids.shape[1], experts.up.shape[0])
        mixed, dropped = _on_owners(rows, sizes, room, exchange, own_experts)
    mixed = _reorder(mixed, inverse, order).reshape(*ids.shape, -1)
    if shares is not None:
        return mixed.sum(1), dropped
    return jnp.einsum("mkd,mk->md", mixed, weights.astype(mixed.dtype)), dropped


def _on_owners(
    rows: Float[Array, "A D"], sizes: Int[Array, " E"], room: int, exchange: Exchange, own_experts: Callable[..., Any]
) -> tuple[Float[Array, "A D"], Int[Array, ""]]:
    """Send sorted rows to the devices that own their experts, apply these, and send the results back.

    Nothing is dropped in transit: each device has `room` for the most rows that any other can send it, and computes
    those that arrived.
    """
    count = len(rows)
    sizes = sizes.reshape(exchange.devices, -1)
    ends = jnp.cumsum(sizes.sum(1))
    starts = ends - sizes.sum(1)
    places = jnp.arange(room)
    place = starts[:, None] + places
    parts = jnp.where((place < ends[:, None])[..., None], rows[jnp.minimum(place, count - 1)], 0)  # [devices, room, D]
    received, their_sizes = exchange.all_to_all(parts), exchange.all_to_all(sizes)
    # Received rows are sorted too: a row's index tells its expert. Empty places get an id past this device's experts.
    ids = (places[:, None] >= jnp.cumsum(their_sizes, 1)[:, None]).sum(-1).reshape(-1)
    order, inverse = _sorted(ids, sizes.shape[1])
    ours = _reorder(received.reshape(-1, rows.shape[1]), order, inverse)
    mixed, dropped = own_experts(ours, ids[order], their_sizes.sum(0))
    returned = exchange.all_to_all(_reorder(mixed, inverse, order).reshape(parts.shape))
    index = jnp.arange(count)
    device = jnp.minimum(jnp.searchsorted(ends, index, side="right"), exchange.devices - 1)
    # Of all the room that was returned the backward pass reads these rows alone.
    return kept(jnp.where((index < ends[-1])[:, None], returned[device, index - starts[device]], 0)), dropped


def _sorted(ids: Int[Array, " A"], most: int) -> tuple[Int[Array, " A"], Int[Array, " A"]]:
    """(the order that sorts ids from 0 to `most`, keeping equals as they are, and its inverse)."""
    count = len(ids)
    index = jnp.arange(count)
    if (most + 1) * count < 2**31:
        # Each id with its index in one number: a CPU sorts these several times as fast as ids that carry indices along.
        order = jnp.sort(ids * count + index) % count
    else:
        order = jnp.argsort(ids, stable=True)
    return order, jnp.zeros_like(order).at[order].set(index, unique_indices=True)


def check_implementation(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise BadInput(f"dispatch={name!r} is unknown; {did_you_mean(name, IMPLEMENTATIONS)}")


def choose(name: str) -> str:
    """The implementation to run for a name, which may be "auto"."""
    check_implementation(name)
    if name != "auto":
        return name
    return ON_GPU if target_platform() == "gpu" and works_here() else AUTOMATIC


def apart_pays(implementation: str, num_experts: int, rows: int) -> bool:
    """Whether decoding of so many rows is faster with experts that lie apart (off a mesh)."""
    on_cpu = target_platform() == "cpu" and choose(implementation) == "blocks"
    return on_cpu and num_experts <= MOST_APART and rows <= MOST_ROWS_APART


def _dense(x: Array, ids: Array, weights: Array, experts: ExpertWeights, activation: Activation) -> Array:
    down = _all_experts(x, "md", experts, activation)
    chosen = jax.nn.one_hot(ids, experts.up.shape[0], dtype=down.dtype)  # all zeros for the id E
    return jnp.einsum("mke,mk,emd->md", chosen, weights.astype(down.dtype), down)


def _all_experts(x: Array, axes: str, experts: ExpertWeights, activation: Activation) -> Float[Array, "E M D"]:
    """Every expert at once, on the same rows ("md") or each on rows of its own ("emd")."""
    up = jnp.einsum(f"{axes},edpf->empf", x, experts.up)
    if experts.up_low_rank is not None:
        up += jnp.einsum(f"{axes},edr,erpf->empf", x, *experts.up_low_rank)
    if experts.up_bias is not None:
        up += experts.up_bias[:, None]
    activated = activation(up)
    down = jnp.einsum("emf,efd->emd", activated, experts.down)
    if experts.down_low_rank is not None:
        down += jnp.einsum("emf,efr,erd->emd", activated, *experts.down_low_rank)
    if experts.down_bias is not None:
        down += experts.down_bias[:, None]
    return down


# A permutation's gradient is the inverse permutation: written as such, both ways are gathers. Automatic
# differentiation would scatter, several times as slowly on a CPU.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x: Float[Array, "M D"], order: Int[Array, " A"], inverse: Int[Array, " A"], k: int) -> Float[Array, "A D"]:
    """The token of each assignment, in sorted order."""
    return x[order // k]


def _spread_forward(x: Array, order: Array, inverse: Array, k: int) -> tuple[Array, Array]:
    return x[order // k], inverse


def _spread_backward(k: int, inverse: Array, grad: Array) -> tuple[Array, None, None]:
    return grad[inverse].reshape(-1, k, grad.shape[-1]).sum(1), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _reorder(rows: Float[Array, "A D"], index: Int[Array, " A"], inverse: Int[Array, " A"]) -> Float[Array, "A D"]:
    """rows[index]."""
    return rows[index]


_reorder.defvjp(lambda rows, index, inverse: (rows[index], inverse), lambda inverse, grad: (grad[inverse], None, None))


def _by_products(
    rows: Array,
    experts: ExpertWeights,
    sizes: Array,
    activation: Activation,
    product: Product,
    shares: Float[Array, "A 1"] | None,
) -> Float[Array, "A D"]:
    """What experts give, times `shares`; zero for rows of no expert, as `product` has it."""
    ones = jnp.ones((len(rows), 1), rows.dtype)
    shares = ones if shares is None else shares.astype(rows.dtype)

    def layer(rows: Array, one: Array, matrices: Array, low_rank: tuple[Array, Array] | None, bias: Any) -> Array:
        mixed = product(rows, matrices, sizes)
        if low_rank is not None:
            first, last = low_rank
            mixed += product(product(rows, first, sizes), _flat(last), sizes)
        if bias is not None:  # As a product, whose gradient adds up in float32 too.
            mixed += product(one, bias[:, None], sizes)
        return mixed

    count, _, parts, hidden = experts.up.shape
    up_bias = None if experts.up_bias is None else experts.up_bias.reshape(count, -1)
    up = layer(rows, ones, _flat(experts.up), experts.up_low_rank, up_bias)
    activated = activation(up.reshape(-1, parts, hidden))
    activated *= repeated(shares, activated)
    return layer(activated, shares, experts.down, experts.down_low_rank, experts.down_bias)


def _flat(matrices: Float[Array, "E D *PF"]) -> Float[Array, "E D F"]:
    return matrices.reshape(*matrices.shape[:2], -1)


def _ragged_product(rows: Array, matrices: Array, sizes: Array) -> Array:
    real = (jnp.arange(len(rows)) < sizes.sum())[:, None]  # Rows of no expert may hold anything.
    return jnp.where(real, jax.lax.ragged_dot(rows, matrices, sizes), 0)


PRODUCTS: dict[str, Product] = {"ragged": _ragged_product, "grouped": grouped_product}


def _in_slots(
    rows: Array, ids: Array, experts: ExpertWeights, sizes: Array, activation: Activation, capacity: int | None
) -> tuple[Array, Array]:
    """(mixed rows, the number of dropped ones)."""
    if capacity is None:
        raise BadInput("dispatch='capacity' needs a capacity_factor; give one, such as 1.25")
    count = experts.up.shape[0]
    starts = jnp.cumsum(sizes) - sizes
    real = ids < count
    place = jnp.arange(len(rows)) - starts[jnp.minimum(ids, count - 1)]
    placed = real & (place < capacity)
    # Slot s of expert e holds the row starts[e] + s, if there is one.
    held = jnp.arange(capacity) < sizes[:, None]
    index = jnp.where(held, starts[:, None] + jnp.arange(capacity), 0)
    slots = jnp.where(held[..., None], rows[index], 0)
    down = _all_experts(slots, "emd", experts, activation)
    mixed = down[jnp.minimum(ids, count - 1), jnp.where(placed, place, 0)]
    return jnp.where(placed[:, None], mixed, 0), (real & ~placed).sum()


def slots_each(factor: float, assignments: int, num_experts: int) -> int:
    """Slots per expert: `factor` times an equal share of the assignments, and at most all of them (Fedus et al. 2021,
    arXiv:2101.03961, eq. 3). `assignments` include those of padding, because shapes cannot depend on the data."""
    return min(int(np.ceil(factor * assignments / num_experts)), assignments)
