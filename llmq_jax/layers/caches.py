"""Key/value caches for decoding: one per layer, explicit arguments and results.

Every kind of cache offers the same four operations:

    cache = Kind.create(...)                              empty, of a given length
    cache = cache.write(keys, values, positions)          at the given position of each row
    keys, values, key_positions = cache.read()            all slots, and the position that each slot stands for
    cache = cache.extend(length)                          more slots

Nothing records how many slots are filled. Attention masks by position, a token is written before it looks, and a row
is written in order, so that whatever stands beyond a row's position (right padding of a prompt, tokens of a rejected
draft) is invisible until it is overwritten: to roll back is to write at an earlier position.
"""

import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int


@struct.dataclass
class FullCache:
    """Keys and values of all positions; slot = position."""

    keys: Float[Array, "*L B K S H"]
    values: Float[Array, "*L B K S H"]

    @classmethod
    def create(cls, batch: int, length: int, num_heads: int, head_dim: int, dtype: Dtype) -> "FullCache":
        zeros = jnp.zeros((batch, num_heads, length, head_dim), dtype)
        return cls(keys=zeros, values=zeros)

    def write(
        self, keys: Float[Array, "B K T H"], values: Float[Array, "B K T H"], positions: Int[Array, "B T"]
    ) -> "FullCache":
        rows = jnp.arange(positions.shape[0])[:, None, None]
        heads = jnp.arange(keys.shape[1])[None, :, None]
        slots = positions[:, None, :]
        return FullCache(
            keys=self.keys.at[rows, heads, slots].set(keys.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[rows, heads, slots].set(values.astype(self.values.dtype), mode="drop"),
        )

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "B S"]]:
        batch, _, length, _ = self.keys.shape
        return self.keys, self.values, jnp.broadcast_to(jnp.arange(length), (batch, length))

    def extend(self, length: int) -> "FullCache":
        """The same cache with `length` slots in all."""
        more = [(0, 0), (0, 0), (0, length - self.keys.shape[2]), (0, 0)]
        return FullCache(keys=jnp.pad(self.keys, more), values=jnp.pad(self.values, more))
