"""The one attention core: scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

Queries may outnumber keys and values: N query heads in K groups (K = N is multi-head attention, K = 1 multi-query).
What may look at what comes from facts, never from token ids: positions (causality) and segment ids (packed documents
and padding, which is segment 0). A query sees a key of its own segment that does not lie after it. Padding sees
padding, so that no row of scores is ever empty and nothing becomes NaN.

Projections give [B, T, heads, H]; products over positions want heads before positions. Queries, keys and values are
transposed once on the way in and the result once on the way out (caches hold keys and values in that order already):
left to XLA, each product and each of its gradients gets transposes of its own, at twice the time on a CPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

# Blocks of queries that a sequence is cut into, by backend (others: one). Each block is compiled apart, so there are
# few; and below a certain length a block costs more than the masked part that it skips.
QUERY_BLOCKS = {"cpu": 4}
SHORTEST_QUERY_BLOCK = 64


@struct.dataclass
class Context:
    """Where the tokens of a batch stand; the same for all layers."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    """0 is padding; the documents packed into a row are numbered 1, 2, ... None: one document, nothing padded."""


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """True where a query may look at a key."""
    mask = key_positions[:, None, :] <= query_positions[:, :, None]
    if query_segments is not None:
        mask &= key_segments[:, None, :] == query_segments[:, :, None]
    return mask


def attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax(Q Kᵀ · scale) V over the visible keys: the reference form. The softmax runs in float32."""
    batch, num_heads, length, width = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, num_heads // groups, length, width)
    scores = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None and dropout_rate > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights.astype(value.dtype), value)
    return mixed.reshape(batch, num_heads, length, width)


def self_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    context: Context,
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    query_block: int | None = None,
) -> Float[Array, "B N T H"]:
    """Causal attention of a sequence to itself, in blocks of queries that skip the keys after them.

    Tokens of a segment must stand in the order of their positions, as they do in every batch: then no query of a block
    can see a key beyond the block's end, and the upper triangle of scores is never computed. `query_block` is the
    block's length (None: by backend; the length of the sequence gives the reference form).
    """
    length = query.shape[2]
    blocks = QUERY_BLOCKS.get(jax.default_backend(), 1)
    block = query_block or max(SHORTEST_QUERY_BLOCK, -(-length // blocks))
    if dropout_key is not None and dropout_rate > 0.0:
        block = length  # One key draws one mask.
    positions, segments = context.positions, context.segment_ids
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = visible(
            positions[:, start:end],
            positions[:, :end],
            None if segments is None else segments[:, start:end],
            None if segments is None else segments[:, :end],
        )
        outputs.append(
            attend(
                query[:, :, start:end],
                key[:, :, :end],
                value[:, :, :end],
                mask,
                scale=scale,
                dropout_rate=dropout_rate,
                dropout_key=dropout_key,
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    context: Context,
    cache: Any = None,
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> tuple[Float[Array, "B T N H"], Any]:
    """What a block calls: attention to the sequence itself, or through its cache: (mixed values, cache)."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # heads before positions
    if cache is None:
        mixed = self_attention(
            query, key, value, context, scale=scale, dropout_rate=dropout_rate, dropout_key=dropout_key
        )
    else:
        cache = cache.write(key, value, context.positions)
        keys, values, key_positions = cache.read()
        mixed = attend(query, keys, values, visible(context.positions, key_positions), scale=scale)
    return mixed.swapaxes(1, 2), cache
