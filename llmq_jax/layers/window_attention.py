"""Self-attention in a layer with a window, linear in the length of the sequence, in time and in memory, forward and
backward (Child et al. 2019, arXiv:1904.10509; Beltagy et al. 2020, arXiv:2004.05150, section 3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from llmq_jax.layers.caches import NOWHERE
from llmq_jax.layers.recomputation import kept
from llmq_jax.layers.scaled_dot_product import (
    attend,
    in_groups,
    lean_again,
    lean_backward,
    lean_forward,
    ungrouped,
    visible,
)

# Shorter blocks cost more than the masked scores that they save; the scores of longer ones overflow the CPU's cache.
SHORTEST_BLOCK, LONGEST_BLOCK = 64, 256
# Queries per step of the loop over blocks, which unrolls at least two blocks: a block alone leaves cores idle between
# its operations.
QUERIES_OF_A_STEP = 256


def window_block(window: int) -> int:
    """Queries per block. At half a window, a block needs 3/2 windows of keys: its own and those of 2 blocks before."""
    return min(max(SHORTEST_BLOCK, -(-window // 2)), LONGEST_BLOCK)


def window_blocks(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T V"],
    places: tuple[Int[Array, "B T"], Int[Array, "B T"] | None],
    block: int,
    window: int,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    **options: Any,
) -> Float[Array, "B N T V"]:
    """A loop over blocks of queries, each scored against its own keys and those of the blocks that its window reaches.
    `places` are the positions and segment ids of the row.

    The backward pass recomputes the scores block by block, so that only those of a few blocks are ever in memory. The
    mixed values, largest scores and totals are kept, as in FlashAttention.
    """
    length = query.shape[2]
    loop = _WindowLoop(block, -(-(window - 1) // block), window, **options)

    def padded(x: Array | None, axis: int, before: int, fill: int = 0) -> Array | None:
        """Padded at the end to whole blocks, and in front by `before` blocks."""
        if x is None:
            return None
        pad = [(0, 0)] * x.ndim
        pad[axis] = (before * block, -length % block)
        return jnp.pad(x, pad, constant_values=fill)

    # Padding gets the position NOWHERE: no token sees it, and it sees itself.
    positions, segments = places
    padded_places = padded(positions, 1, loop.reach, NOWHERE), padded(segments, 1, loop.reach)
    keys, values = (padded(x, 2, loop.reach) for x in (key, value))
    return _windowed(padded(query, 2, 0), keys, values, padded_places, dropout_key, loop)[:, :, :length]


@dataclass(frozen=True)
class _WindowLoop:
    """The static parameters of the loop over blocks."""

    block: int
    reach: int
    """How many earlier blocks hold keys within the window of a block of queries."""
    window: int
    scale: float
    softcap: float | None
    dropout_rate: float

    def cut(self, x: Array, start: Array, axis: int = 2) -> Array:
        """A block of queries, or of an array with the same axis."""
        return jax.lax.dynamic_slice_in_dim(x, start, self.block, axis)

    def cut_near(self, x: Array, start: Array, axis: int = 2) -> Array:
        """The keys, or values, of that block and of the `reach` blocks before it. Keys are padded by `reach` blocks in
        front, so that these begin at the same `start`."""
        return jax.lax.dynamic_slice_in_dim(x, start, (self.reach + 1) * self.block, axis)

    def cut_all(
        self, query: Array, key: Array, value: Array, places: tuple[Array, Array | None], start: Array
    ) -> tuple[Array, Array, Array, Array]:
        """The inputs of a block's attention: its queries, the keys and values within reach, and their mask."""
        block = self.cut(query, start), self.cut_near(key, start), self.cut_near(value, start)
        own = start + self.reach * self.block  # where `places`, which are padded as keys are, have the queries
        positions, segments = places
        mask = visible(
            self.cut(positions, own, 1),
            self.cut_near(positions, start, 1),
            None if segments is None else self.cut(segments, own, 1),
            None if segments is None else self.cut_near(segments, start, 1),
            self.window,
        )
        return *block, mask

    def dropping(self, key: Array, index: Array) -> dict[str, Any]:
        """The options of `attend` for a block with dropout."""
        options = {"scale": self.scale, "softcap": self.softcap, "dropout_rate": self.dropout_rate}
        return options | {"dropout_key": jax.random.fold_in(key, index)}

    def run(self, step: Callable[[Array, Any], Any], state: Any, length: int) -> Any:
        """`state` after `step(index, state)` for all blocks in order."""
        indices, unroll = jnp.arange(length // self.block), max(2, QUERIES_OF_A_STEP // self.block)
        return jax.lax.scan(lambda state, i: (step(i, state), None), state, indices, unroll=unroll)[0]


# With a hand-written gradient: JAX's own would keep a copy of the keys within reach for each block.
@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _windowed(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    places: tuple[Int[Array, "B S"], Int[Array, "B S"] | None],
    dropout_key: Array | None,
    loop: _WindowLoop,
) -> Float[Array, "B N T V"]:
    """Keys, values and `places` are padded by `loop.reach` blocks in front: token i is at index i + reach · block."""
    return _windowed_forward(query, key, value, places, dropout_key, loop)[0]


def _windowed_forward(
    query: Array, key: Array, value: Array, places: Any, dropout_key: Array | None, loop: _WindowLoop
) -> tuple[Array, tuple[Any, ...]]:
    def one_block(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        start = index * loop.block
        block = loop.cut_all(query, key, value, places, start)
        found: tuple[Array, ...]
        if dropout_key is None:
            _, saved = lean_forward(*block, loop.scale, loop.softcap)
            found = ungrouped(saved.mixed), ungrouped(saved.largest), ungrouped(saved.total)
        else:
            found = (attend(*block, **loop.dropping(dropout_key, index)),)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, part, start, 2) for x, part in zip(state, found, strict=True)
        )

    rows = query.shape[:3]
    if dropout_key is None:
        state = [jnp.zeros((*rows, width), jnp.float32) for width in (value.shape[3], 1, 1)]
    else:
        state = [jnp.zeros((*rows, value.shape[3]), value.dtype)]
    mixed, *sums = kept(loop.run(one_block, tuple(state), rows[2]))
    results = (mixed, *sums) if dropout_key is None else ()
    return mixed.astype(value.dtype), (query, key, value, places, dropout_key, *results)


def _windowed_backward(loop: _WindowLoop, saved: tuple[Any, ...], grad: Array) -> tuple[Any, ...]:
    query, key, value, places, dropout_key, *results = saved

    def one_block(index: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start = index * loop.block
        block = loop.cut_all(query, key, value, places, start)
        own_grad = loop.cut(grad, start)
        if dropout_key is None:
            mixed, largest, total = (in_groups(loop.cut(x, start), key) for x in results)
            again = lean_again(*block, loop.scale, loop.softcap, largest, total, mixed)
            own, *near, _ = lean_backward(loop.scale, loop.softcap, again, own_grad)
        else:
            *inputs, mask = block
            mix = partial(attend, mask=mask, **loop.dropping(dropout_key, index))
            own, *near = jax.vjp(mix, *inputs)[1](own_grad)
        query_grad, *others = grads
        key_grad, value_grad = (
            jax.lax.dynamic_update_slice_in_dim(x, loop.cut_near(x, start) + part, start, 2)
            for x, part in zip(others, near, strict=True)
        )
        own = own.astype(query_grad.dtype)
        return jax.lax.dynamic_update_slice_in_dim(query_grad, own, start, 2), key_grad, value_grad

    # In float32: a key's gradient is the sum of what several blocks add to it.
    found = loop.run(one_block, tuple(jnp.zeros(x.shape, jnp.float32) for x in saved[:3]), query.shape[2])
    return *(grad.astype(x.dtype) for grad, x in zip(found, saved[:3], strict=True)), None, None


_windowed.defvjp(_windowed_forward, _windowed_backward)
