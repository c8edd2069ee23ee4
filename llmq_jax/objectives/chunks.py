"""Tokens in chunks, so that the logits of only a few exist at a time.

The tokens that count come first, so that the chunks after the last of them can be skipped: prompts and padding cost no
logits but those that fill up a chunk. On a mesh, each chunk has equally many tokens of every group of devices
(`layers.axes.row_groups`), which stay there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmq_jax.layers.axes import by_group, constrain, row_groups

_taken = by_group(lambda x, places: x[places])


def chunk_tokens(vocabulary: int, *, elements: int, on_gpu: int, shortest: int) -> int:
    """Tokens of a chunk whose logits have up to `elements` elements, though at least `shortest`. On a GPU they have up
    to `on_gpu`, and the tokens are a power of two, which divides most batches and suits its products.

    A chunk of n tokens takes 6 n D V FLOP, and the head, its cast and its gradient are some 20 D V bytes to read and
    write. A GPU that computes 300 FLOP in the time of one byte (an H100) therefore waits for its memory, unless n is
    well above 1,000.
    """
    if jax.default_backend() != "gpu":
        return max(shortest, elements // vocabulary)
    return max(shortest, 1 << ((on_gpu // vocabulary).bit_length() - 1))


@dataclass(frozen=True)
class Chunks:
    """How the tokens of a batch [B, T] are cut."""

    shape: tuple[int, int]
    """(B, T)."""
    chunks: int
    order: Int[Array, "groups count"]
    """Places of each group's tokens: first those whose mask is not 0, then the others, both in the batch's order."""

    @classmethod
    def of(cls, mask: Float[Array, "B T"], longest: int) -> "Chunks":
        """Chunks of at most `longest` tokens of each group."""
        groups = row_groups(len(mask))
        count = mask.size // groups
        order = jnp.argsort(mask.reshape(groups, count) == 0, axis=1, stable=True)
        rows, tokens = mask.shape
        return cls((rows, tokens), max(1, -(-count // longest)), order)  # at least one chunk

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
