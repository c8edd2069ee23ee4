"""The one attention core: scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

Queries may outnumber keys and values: N query heads in K groups (K = N is multi-head attention, K = 1 multi-query).
What may look at what comes from facts, never from token ids: positions (causality) and segment ids (packed documents
and padding, which is segment 0). A query sees a key of its own segment that does not lie after it. Padding sees
padding, so that no row of scores is ever empty and nothing becomes NaN.

Projections give [B, T, heads, H]; products over positions want heads before positions. Queries, keys and values are
transposed once on the way in and the result once on the way out (caches hold keys and values in that order already):
left to XLA, each product and each of its gradients gets transposes of its own, at twice the time on a CPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from llmq_jax.layers.positions import Rotation

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
    rotation: Rotation | None = None
    """How RoPE turns queries and keys at these positions, in architectures that have it."""
    local_rotation: Rotation | None = None
    """The same in layers with a window, where these have frequencies of their own."""


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """True where a query may look at a key; a window is the number of keys that it sees, its own among them."""
    mask = key_positions[:, None, :] <= query_positions[:, :, None]
    if window is not None:
        mask &= key_positions[:, None, :] > query_positions[:, :, None] - window
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
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax(Q Kᵀ · scale) V over the visible keys: the reference form. The softmax runs in float32.

    `softcap` c bounds the scores: c · tanh(scores / c) (Gemma 2, arXiv:2408.00118, section 2).
    """
    query = _in_groups(query, key)
    weights = jax.nn.softmax(_scores(query, key, mask, scale, softcap), axis=-1)
    if dropout_key is not None and dropout_rate > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    return _heads(jnp.einsum("bkgts,bksh->bkgth", weights.astype(value.dtype), value))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def lean_attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B N T H"]:
    """`attend` without dropout, in fewer passes over [T, S], forward and back.

    The sum of the exponentials divides the mixed values, not the weights. And the softmax's gradient needs for each
    query the sum over keys of weight · slope, which equals the product of the mixed values with their own slope
    (Dao et al. 2022, arXiv:2205.14135, appendix B.2, eq. 4).
    """
    return _lean_forward(query, key, value, mask, scale)[0]


def _lean_forward(query, key, value, mask, scale):
    query = _in_groups(query, key)
    scores = _scores(query, key, mask, scale)
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = exponentials.sum(-1, keepdims=True)
    exponentials = exponentials.astype(value.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", exponentials, value, preferred_element_type=jnp.float32) / total
    return _heads(mixed.astype(value.dtype)), (query, key, value, exponentials, total, mixed)


def _lean_backward(scale, saved, slope):
    query, key, value, exponentials, total, mixed = saved
    slope = _in_groups(slope, key)
    sums = (slope * mixed).sum(-1, keepdims=True)  # in float32, as `mixed` is: differences are taken with them
    weight_slope = jnp.einsum("bkgth,bksh->bkgts", slope, value, preferred_element_type=jnp.float32)
    score_slope = (exponentials * (weight_slope - sums) * (scale / total)).astype(value.dtype)
    return (
        _heads(jnp.einsum("bkgts,bksh->bkgth", score_slope, key)),
        jnp.einsum("bkgts,bkgth->bksh", score_slope, query),
        jnp.einsum("bkgts,bkgth->bksh", exponentials, (slope / total).astype(value.dtype)),
        None,
    )


lean_attend.defvjp(_lean_forward, _lean_backward)


def _in_groups(query: Float[Array, "B N T H"], key: Float[Array, "B K S H"]) -> Float[Array, "B K G T H"]:
    """Query heads by the key's head that they share."""
    batch, num_heads, length, width = query.shape
    return query.reshape(batch, key.shape[1], num_heads // key.shape[1], length, width)


def _heads(grouped: Float[Array, "B K G T H"]) -> Float[Array, "B N T H"]:
    return grouped.reshape(grouped.shape[0], -1, *grouped.shape[3:])


def _scores(query, key, mask, scale, softcap=None) -> Float[Array, "B K G T S"]:
    scores = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def self_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    context: Context,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    query_block: int | None = None,
) -> Float[Array, "B N T H"]:
    """Causal attention of a sequence to itself, in blocks of queries that skip the keys after them.

    Tokens of a segment must stand in the order of their positions, as they do in every batch: then no query of a block
    can see a key beyond the block's end, and the upper triangle of scores is never computed. `query_block` is the
    block's length (None: by backend). Dropout takes the reference form, in one block: one key draws one mask.
    """
    length = query.shape[2]
    dropout = dropout_key is not None and dropout_rate > 0.0
    block = query_block or max(SHORTEST_QUERY_BLOCK, -(-length // QUERY_BLOCKS.get(jax.default_backend(), 1)))
    positions, segments = context.positions, context.segment_ids
    outputs = []
    for start in range(0, length, length if dropout else block):
        end = length if dropout else min(start + block, length)
        mask = visible(
            positions[:, start:end],
            positions[:, :end],
            None if segments is None else segments[:, start:end],
            None if segments is None else segments[:, :end],
            window,
        )
        queries, keys, values = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        if dropout or softcap is not None:
            options = {"softcap": softcap, "dropout_rate": dropout_rate, "dropout_key": dropout_key}
            mixed = attend(queries, keys, values, mask, scale=scale, **options)
        else:
            mixed = lean_attend(queries, keys, values, mask, scale)
        outputs.append(mixed)
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    context: Context,
    cache: Any = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> tuple[Float[Array, "B T N H"], Any]:
    """What a block calls: attention to the sequence itself, or through its cache: (mixed values, cache)."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # heads before positions
    if cache is None:
        mixed = self_attention(
            query,
            key,
            value,
            context,
            scale=scale,
            window=window,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
    else:
        cache = cache.write(key, value, context.positions)
        keys, values, key_positions = cache.read()
        mask = visible(context.positions, key_positions, window=window)
        if softcap is not None:
            mixed = attend(query, keys, values, mask, scale=scale, softcap=softcap)
        else:
            mixed = lean_attend(query, keys, values, mask, scale)
    return mixed.swapaxes(1, 2), cache
