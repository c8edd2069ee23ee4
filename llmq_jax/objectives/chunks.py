"""Tokens in chunks, so that the logits of one chunk exist at a time. On a mesh a chunk has equally many tokens of each
group of devices (`layers.axes.row_groups`), and these stay there."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from llmq_jax.layers.axes import constrain, row_groups


@dataclass(frozen=True)
class Chunks:
    """How many tokens there are, and how they are cut."""

    groups: int
    """Groups of devices."""
    count: int
    """Tokens of a group."""
    chunks: int
    """Chunks, each with tokens of every group."""

    @classmethod
    def of(cls, rows: int, tokens: int, longest: int) -> "Chunks":
        """For `rows` rows with `tokens` tokens in all: chunks of at most `longest` tokens of each group."""
        groups = row_groups(rows)
        count = tokens // groups
        return cls(groups, count, max(1, -(-count // longest)))  # at least one chunk

    @property
    def size(self) -> int:
        """Tokens of a group in a chunk."""
        return -(-self.count // self.chunks)

    def by_group(self, x: Array) -> Array:
        """[B, T, ...] to [groups, count, ...]."""
        return x.reshape(self.groups, self.count, *x.shape[2:])

    def split(self, x: Array) -> Array:
        """[groups, count, ...], padded with zeros, to [chunks, groups, size, ...]."""
        filled = jnp.pad(x, [(0, 0), (0, self.chunks * self.size - self.count)] + [(0, 0)] * (x.ndim - 2))
        parts = filled.reshape(self.groups, self.chunks, self.size, *x.shape[2:])
        return constrain(parts.swapaxes(0, 1), None, "batch")

    def join(self, x: Array) -> Array:
        """[chunks, groups, size] to [groups, chunks · size], in which all after the first `count` are padding."""
        return x.swapaxes(0, 1).reshape(self.groups, self.chunks * self.size)
