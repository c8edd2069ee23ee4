"""Tokens in chunks, so that the logits of only a few exist at a time.

The tokens that count come first, so that the chunks after the last of them can be skipped: prompts and padding cost no
logits but those that fill up a chunk. On a mesh, each chunk has equally many tokens of every group of devices
(`layers.axes.row_groups`), which stay there.

Losses that go through the head in chunks write their own gradient (`jax.custom_vjp`): a loop of as many rounds as there
are chunks that count has no automatic one. Nor has that gradient one in reverse; forward over reverse, as in
`jax.hessian`, works.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmq_jax.layers.axes import by_group, constrain, row_groups, target_platform

_taken = by_group(lambda x, places: x[places])


def chunk_tokens(vocabulary: int, *, elements: Mapping[str, int], shortest: int) -> int:
    """Tokens of a chunk whose logits have up to so many `elements`, by backend, though at least `shortest` tokens. On a
    GPU or TPU they are a power of two, which divides most batches and suits its products.

    A chunk of n tokens takes 6 n D V FLOP, and the head, its cast and its gradient are some 20 D V bytes to read and
    write. A device that computes 300 FLOP in the time of one byte (an H100; 560: a TPU v6e) therefore waits for its
    memory, unless n is well above 1,000.
    """
    platform = target_platform()
    tokens = max(shortest, elements.get(platform, elements["cpu"]) // vocabulary)
    return 1 << (tokens.bit_length() - 1) if platform in ("gpu", "tpu") else tokens


@dataclass(frozen=True)
class Chunks:
    """How the tokens of a batch [B, T] are cut."""

    shape: tuple[int, int]
    """(B, T)."""
    chunks: int
    order: Int[Array, "groups count"]
    """Places of each group's tokens: first those whose mask is not 0, then the others, both in the batch's order."""
    mask: Float[Array, "B T"]
    """0 at tokens that do not count."""

    @classmethod
    def of(cls, mask: Float[Array, "B T"], longest: int) -> "Chunks":
        """Chunks of at most `longest` tokens of each group."""
        groups = row_groups(len(mask))
        count = mask.size // groups
        order = jnp.argsort(mask.reshape(groups, count) == 0, axis=1, stable=True)
        rows, tokens = mask.shape
        return cls((rows, tokens), max(1, -(-count // longest)), order, mask)  # at least one chunk

    @property
    def groups(self) -> int:
        """Groups of devices."""
        return self.order.shape[0]

    @property
    def size(self) -> int:
        """Tokens of a group in a chunk."""
        return -(-self.order.shape[1] // self.chunks)

    def split(self, x: Array) -> Array:
        """[B, T, ...] to [chunks, groups, size, ...], padded with zeros."""
        x = x.reshape(*self.order.shape, *x.shape[2:])
        if self.chunks > 1:  # one chunk holds all tokens, in any order
            x = _taken(x, self.order)
        padded = jnp.pad(x, [(0, 0), (0, self.chunks * self.size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        parts = padded.reshape(self.groups, self.chunks, self.size, *x.shape[2:])
        return constrain(parts.swapaxes(0, 1), None, "batch")

    def join(self, parts: Array) -> Array:
        """The way back: [chunks, groups, size, ...] to [B, T, ...]."""
        x = parts.swapaxes(0, 1).reshape(self.groups, self.chunks * self.size, *parts.shape[3:])
        if self.chunks > 1:
            x = _taken(x, jnp.argsort(self.order, axis=1))
        return x.reshape(*self.shape, *x.shape[2:])

    def run(self, function: Callable[..., tuple[Any, Any]], *rows: Array) -> tuple[Any, Any]:
        """(sums over all chunks, results [B, T, ...]) of `function`, which makes them of the rows of a chunk; chunks in
        which no token counts give 0. `rows` are arrays [B, T, ...].

        Sums are in float32, because there may be many chunks, and those of groups of devices are added up only at the
        end.
        """
        parts = tuple(map(self.split, rows))
        of_groups = by_group(function)
        if self.chunks == 1:
            sums, results = of_groups(*(part[0] for part in parts))
            return jax.tree.map(_summed, sums), jax.tree.map(lambda leaf: self.join(leaf[None]), results)
        sums, results = jax.eval_shape(lambda *parts: of_groups(*(part[0] for part in parts)), *parts)
        totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), sums)
        stacked = jax.tree.map(lambda leaf: jnp.zeros((self.chunks, *leaf.shape), leaf.dtype), results)

        # The tokens that count come first. Here: one exchange between devices for all chunks.
        counted = (self.mask != 0).reshape(self.groups, -1).sum(1).max()

        def unfinished(state: tuple[Array, Any, Any]) -> Array:
            # The second implies the first, which is there for `train.plan`: that multiplies what a round sends by the
            # most rounds, and reads only a number as such (test_most_rounds_of_the_loop_over_chunks).
            i = state[0]
            return (i < self.chunks) & (i * self.size < counted)

        def one_chunk(state: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
            i, totals, stacked = state
            sums, results = of_groups(*(part[i] for part in parts))
            put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return i + 1, jax.tree.map(jnp.add, totals, sums), jax.tree.map(put, stacked, results)

        _, totals, stacked = jax.lax.while_loop(unfinished, one_chunk, (jnp.int32(0), totals, stacked))
        return jax.tree.map(_summed, totals), jax.tree.map(self.join, stacked)


def _summed(leaf: Array) -> Array:
    """The sum over groups of devices."""
    return leaf.sum(0, dtype=jnp.float32)


@jax.custom_jvp
def at_targets(values: Float[Array, "N V"], targets: Int[Array, " N"]) -> Float[Array, " N"]:
    """values[n, targets[n]], or 0 where there is none, as for padding's target -100. The gradient of this lookup is a
    comparison, because its own would be a scatter into another array of this size."""
    found = jnp.take_along_axis(values, targets[:, None], axis=-1, mode="clip")[:, 0]
    return jnp.where((targets >= 0) & (targets < values.shape[-1]), found, 0.0)


@at_targets.defjvp
def _at_targets_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    values, targets = primals
    here = targets[:, None] == jnp.arange(values.shape[-1])
    return at_targets(values, targets), jnp.where(here, tangents[0], 0.0).sum(-1)


def parted(tree: Any) -> tuple[Any, Any]:
    """(the values that need a gradient, those that need none, as a frozen head's) of arguments as `custom_vjp` with
    `symbolic_zeros` gives them. Each tree has None where the other has a value."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    learns = [leaf.value if leaf.perturbed else None for leaf in leaves]
    fixed = [None if leaf.perturbed else leaf.value for leaf in leaves]
    return jax.tree.unflatten(structure, learns), jax.tree.unflatten(structure, fixed)


def merged_trees(first: Any, second: Any) -> Any:
    """The way back from `parted`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)
