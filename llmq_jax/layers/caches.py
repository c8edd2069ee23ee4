"""Caches for decoding, of keys and values or of the latents that these are made of: one per layer, explicit arguments
and results.

Every kind of cache has the same operations on what it holds: keys and values, or latents in `LatentCache`.

    cache = Kind.create(...)                                        empty, of a given length
    cache = cache.write(*held, positions, segment_ids)              at the given positions of each row
    *held, key_positions = cache.read()                             all slots, and the position of each
    cache = cache.extend(length)                                    more slots

Caches of keys and values have one more:

    cache, (keys, values, key_positions) = cache.update(...)        write, then all that the new tokens may attend to

Tokens of segment 0 are padding and are not written. Nothing records how many slots are filled. Attention masks by
position, a token is written before it attends, and a row is written in order. So whatever is stored beyond a row's
position (tokens of a rejected draft) is invisible until it is overwritten, and rolling back is writing at an earlier
position.

Keys are stored with features before slots: their product with a few queries then needs no transposed copy, which would
take as long as the product.

`empty` is static, a fact of the compiled program: True from `create` to the first `write`. A sequence that is written
to an empty cache attends only to itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Shaped

from llmq_jax.errors import BadInput

NOWHERE = int(np.iinfo(np.int32).max)
"""The position of an empty slot: after all queries, so that none sees it."""


class FullCache(struct.PyTreeNode):
    """Keys and values of all positions; slot = position."""

    keys: Float[Array, "*L B K H S"]
    values: Float[Array, "*L B K S V"]
    empty: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(
        cls, batch: int, length: int, num_heads: int, head_dim: int, dtype: Dtype, value_dim: int | None = None
    ) -> "FullCache":
        """`value_dim` is the width of values that are not as wide as keys."""
        return cls(*_no_keys_and_values(batch, num_heads, length, head_dim, dtype, value_dim), empty=True)

    def write(
        self,
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T V"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> "FullCache":
        return FullCache(*_put(self, keys, values, _of_real(positions, segment_ids)))

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S V"], Int[Array, "B S"]]:
        batch, _, length, _ = self.values.shape
        return self.keys.mT, self.values, jnp.broadcast_to(jnp.arange(length), (batch, length))

    def update(
        self, keys: Array, values: Array, positions: Array, segment_ids: Array | None = None
    ) -> tuple["FullCache", tuple[Array, Array, Array]]:
        cache = self.write(keys, values, positions, segment_ids)
        return cache, cache.read()

    def extend(self, length: int) -> "FullCache":
        """The same cache with `length` slots in all, or cut to as many."""
        return self.replace(keys=_resized(self.keys, -1, length), values=_resized(self.values, -2, length))


class LatentCache(struct.PyTreeNode):
    """The latents from which all heads form their keys and values (multi-head latent attention); slot = position.

    For each token the latent, followed by the rotated key that all heads share: C features, stored once instead of once
    per head.
    """

    latents: Float[Array, "*L B S C"]
    empty: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, batch: int, length: int, width: int, dtype: Dtype) -> "LatentCache":
        return cls(jnp.zeros((batch, length, width), dtype), empty=True)

    def write(
        self,
        latents: Float[Array, "B T C"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> "LatentCache":
        rows, slots = jnp.arange(len(latents))[:, None], _of_real(positions, segment_ids)
        return LatentCache(self.latents.at[rows, slots].set(latents.astype(self.latents.dtype), mode="drop"))

    def read(self) -> tuple[Float[Array, "B S C"], Int[Array, "B S"]]:
        batch, length, _ = self.latents.shape
        return self.latents, jnp.broadcast_to(jnp.arange(length), (batch, length))

    def extend(self, length: int) -> "LatentCache":
        return self.replace(latents=_resized(self.latents, -2, length))


class RingCache(struct.PyTreeNode):
    """Keys and values of the last positions, for a layer with a window; slot = position modulo the number of slots.

    `lookahead` slots beyond the window allow a rollback of that many tokens: a rejected draft has then overwritten only
    keys outside the window of every token that follows.
    """

    keys: Float[Array, "*L B K H S"]
    values: Float[Array, "*L B K S V"]
    positions: Int[Array, "*L B S"]
    """The position of the token in each slot."""
    window: int = struct.field(pytree_node=False)
    lookahead: int = struct.field(pytree_node=False)
    empty: bool = struct.field(pytree_node=False, default=False)

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def never_wraps(self) -> bool:
        return self.slots < self.window + self.lookahead

    @classmethod
    def create(
        cls,
        batch: int,
        length: int,
        window: int,
        lookahead: int,
        num_heads: int,
        head_dim: int,
        dtype: Dtype,
        value_dim: int | None = None,
    ) -> "RingCache":
        slots = min(length, window + lookahead)
        held = _no_keys_and_values(batch, num_heads, slots, head_dim, dtype, value_dim)
        return cls(*held, jnp.full((batch, slots), NOWHERE, jnp.int32), window, lookahead, empty=True)

    def write(
        self,
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T V"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> "RingCache":
        """If there are more tokens than slots, each row's last ones are kept. In a cache that never wraps, every
        position of the request has a slot of its own; positions beyond, which only drafts reach, are dropped."""
        slots, count = _of_real(positions, segment_ids), self.positions.shape[1]
        if not self.never_wraps:
            real = slots != NOWHERE
            newest = jnp.where(real, positions, -1).max(axis=1, keepdims=True)
            slots = jnp.where(real & (positions > newest - count), positions % count, NOWHERE)
        rows = jnp.arange(len(positions))[:, None]
        keys, values = _put(self, keys, values, slots)
        return self.replace(
            keys=keys,
            values=values,
            positions=self.positions.at[rows, slots].set(positions, mode="drop"),
            empty=False,
        )

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S V"], Int[Array, "B S"]]:
        return self.keys.mT, self.values, self.positions

    def update(
        self, keys: Array, values: Array, positions: Array, segment_ids: Array | None = None
    ) -> tuple["RingCache", tuple[Array, Array, Array]]:
        cache = self.write(keys, values, positions, segment_ids)
        if self.never_wraps or positions.shape[1] <= self.lookahead + 1:
            return cache, cache.read()
        # With so many tokens, the last overwrite keys that the first still see. So all attend to the ring as it was
        # before (without what a rejected draft left there at their own positions or later) and to each other.
        added = _of_real(positions, segment_ids)
        held = jnp.where(self.positions < added.min(axis=1, keepdims=True), self.positions, NOWHERE)
        return cache, (
            jnp.concatenate([self.keys.mT, keys.astype(self.keys.dtype)], axis=2),
            jnp.concatenate([self.values, values.astype(self.values.dtype)], axis=2),
            jnp.concatenate([held, added], axis=1),
        )

    def extend(self, length: int) -> "RingCache":
        """The same cache for `length` positions in all. Only a cache with fewer than window + lookahead slots grows,
        and such a cache has never wrapped."""
        slots = min(length, self.window + self.lookahead)
        return self.replace(
            keys=_resized(self.keys, -1, slots),
            values=_resized(self.values, -2, slots),
            positions=_resized(self.positions, -1, slots, NOWHERE),
        )


Cache = FullCache | LatentCache | RingCache


def _of_real(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """The positions of tokens; of padding NOWHERE."""
    return positions if segment_ids is None else jnp.where(segment_ids != 0, positions, NOWHERE)


def _no_keys_and_values(
    batch: int, num_heads: int, slots: int, head_dim: int, dtype: Dtype, value_dim: int | None
) -> tuple[Float[Array, "B K H S"], Float[Array, "B K S V"]]:
    value_dim = head_dim if value_dim is None else value_dim
    return jnp.zeros((batch, num_heads, head_dim, slots), dtype), jnp.zeros((batch, num_heads, slots, value_dim), dtype)


def _put(
    cache: FullCache | RingCache,
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T V"],
    slots: Int[Array, "B T"],
) -> tuple[Float[Array, "B K H S"], Float[Array, "B K S V"]]:
    """Write each token to its slot; tokens whose slot does not exist are dropped. BadInput for keys or values of other
    shapes than the cache has."""
    given = keys.shape[1], keys.shape[3], values.shape[3]
    held = cache.keys.shape[1], cache.keys.shape[2], cache.values.shape[3]
    if given != held:
        have, room = ("{} heads of {} features and values of {}".format(*shape) for shape in (given, held))
        raise BadInput(
            f"keys have {have}, but the cache is for {room}: return one with the shapes of your keys and values from "
            "`create_cache` of the block"
        )
    rows = jnp.arange(keys.shape[0])[:, None, None]
    heads = jnp.arange(keys.shape[1])[None, :, None]
    slots = slots[:, None, :]
    return (
        cache.keys.at[rows, heads, :, slots].set(keys.astype(cache.keys.dtype), mode="drop"),
        cache.values.at[rows, heads, slots].set(values.astype(cache.values.dtype), mode="drop"),
    )


def _resized(held: Shaped[Array, "..."], axis: int, slots: int, fill: int = 0) -> Shaped[Array, "..."]:
    ends = [(0, 0, 0)] * held.ndim
    ends[axis] = (0, slots - held.shape[axis], 0)
    resized: Array = jax.lax.pad(held, jnp.asarray(fill, held.dtype), ends)
    return resized
