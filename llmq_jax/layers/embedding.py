"""Tables of vectors, looked up by id; a tied table also serves as the output head."""

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from llmq_jax.layers.axes import looked_up
from llmq_jax.layers.linear import TIED_HEAD, times_transposed


class Embedding(nn.Module):
    """A table [V, D]: `__call__` looks ids up, `logits` scores vectors against every row (the tied head)."""

    vocab_size: int
    features: int
    embedding_init: Initializer = nn.initializers.normal(0.02)
    dtype: Dtype | None = None
    """Type to compute in; None computes in the table's own type."""
    scale: float | None = None
    """Multiplies the vectors that are looked up, not the head's scores; it is rounded to the table's type first."""
    rows: str | None = "vocabulary"
    """Name of the rows' dimension, by which a mesh divides them (`axes.AXES`); None replicates them."""

    def setup(self) -> None:
        self.embedding = self.param("embedding", self.embedding_init, (self.vocab_size, self.features))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        def vectors(table: Array, ids: Array) -> Array:
            rows = table[ids]
            if self.scale is not None:
                rows = rows * jnp.asarray(self.scale, rows.dtype)
            return rows.astype(self.dtype or rows.dtype)

        return looked_up(vectors, self.embedding, ids, self.rows)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """x Eᵀ: the head of models in which it is tied to the table."""
        dtype = self.dtype or self.embedding.dtype
        rows = x.astype(dtype).reshape(-1, self.features)
        table = self.get_variable("params", TIED_HEAD, self.embedding)
        return times_transposed(rows, table.astype(dtype)).reshape(*x.shape[:-1], self.vocab_size)
