"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) of any queries to any keys, under a mask.

It is written twice. `attend` is the formula, with JAX's own gradient; it runs with attention="plain" and with dropout.
`lean_attend` is the same with a hand-written gradient; it runs everywhere else, except where the fused kernel does. A
change of the formula goes into `attend` (docs/attention.md, "To change the attention").

Queries may outnumber keys and values: N query heads in K groups (K = N is multi-head attention, K = 1 multi-query).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from llmq_jax.layers.recomputation import kept


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
        assert key_segments is not None
        mask &= key_segments[:, None, :] == query_segments[:, :, None]
    return mask


def attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B N T S"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "B N T V"]:
    """Softmax(cap(Q Kᵀ · scale) + bias) V over the visible keys. The softmax runs in float32.

    `softcap` c bounds the scores: c · tanh(scores / c) (Gemma 2, arXiv:2408.00118, section 2). `bias` is added to the
    scores of each head; no model here has one.
    """
    query = in_groups(query, key)
    scores = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += in_groups(bias, key)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None and dropout_rate > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    return ungrouped(jnp.einsum("bkgts,bksh->bkgth", weights.astype(value.dtype), value))


class Saved(NamedTuple):
    """What the hand-written gradient reads: the inputs, and for each query the `exponentials` exp(score - largest), the
    `largest` score, the exponentials' `total`, and the `mixed` values that are the output, in float32."""

    query: Float[Array, "B K G T H"]
    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S V"]
    exponentials: Float[Array, "B K G T S"]
    largest: Float[Array, "B K G T 1"]
    total: Float[Array, "B K G T 1"]
    mixed: Float[Array, "B K G T V"]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def lean_attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    mask: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B N T V"]:
    """`attend` without bias and dropout, in fewer passes over [T, S], forward and backward.

    The exponentials themselves mix the values, and their sum divides the result [T, V] in place of the weights [T, S].
    The softmax's gradient needs, for each query, Σ over keys of weight · weight gradient, which equals
    output · output gradient (D in Dao et al. 2022, arXiv:2205.14135, appendix B.2, eq. 4). The softcap's derivative,
    1 - tanh², follows from the capped scores, and these from the saved exponentials: nothing else of size [T, S] is
    kept.
    """
    return lean_forward(query, key, value, mask, scale, softcap)[0]


def lean_forward(
    query: Array, key: Array, value: Array, mask: Array, scale: float, softcap: float | None
) -> tuple[Array, Saved]:
    query = in_groups(query, key)
    scores = _scores(query, key, mask, scale, softcap)
    largest = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - largest)
    total = exponentials.sum(-1, keepdims=True)
    exponentials = kept(exponentials.astype(value.dtype))  # in this type, rather than in float32
    mixed = jnp.einsum("bkgts,bksh->bkgth", exponentials, value, preferred_element_type=jnp.float32) / total
    return ungrouped(mixed.astype(value.dtype)), Saved(query, key, value, exponentials, largest, total, mixed)


def lean_again(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    scale: float,
    softcap: float | None,
    largest: Array,
    total: Array,
    mixed: Array,
) -> Saved:
    """What `lean_forward` saves, from those parts that are linear in T: the exponentials [T, S] are recomputed."""
    query = in_groups(query, key)
    exponentials = jnp.exp(_scores(query, key, mask, scale, softcap) - largest).astype(value.dtype)
    return Saved(query, key, value, exponentials, largest, total, mixed)


def lean_backward(scale: float, softcap: float | None, saved: Saved, grad: Array) -> tuple[Array, Array, Array, None]:
    """In FlashAttention's letters: mixed O, largest m, total l, grad dO, sums D, weight_grad dP, score_grad dS."""
    query, key, value, exponentials, largest, total, mixed = saved
    grad = in_groups(grad, key)
    sums = (grad * mixed).sum(-1, keepdims=True)  # in float32, as `mixed` is, because they are subtracted below
    weight_grad = jnp.einsum("bkgth,bksh->bkgts", grad, value, preferred_element_type=jnp.float32)
    score_grad = exponentials * (weight_grad - sums) * (scale / total)
    if softcap is not None:
        tiny = jnp.finfo(jnp.float32).tiny  # where an exponential is 0: log 0 would make second derivatives NaN
        capped = largest + jnp.log(jnp.maximum(exponentials.astype(jnp.float32), tiny))
        capped = jnp.clip(capped, -softcap, softcap)  # where a query sees no key, `largest` is beyond all scores
        score_grad *= 1.0 - jnp.square(capped / softcap)
    score_grad = score_grad.astype(value.dtype)
    return (
        ungrouped(jnp.einsum("bkgts,bksh->bkgth", score_grad, key)),
        jnp.einsum("bkgts,bkgth->bksh", score_grad, query),
        jnp.einsum("bkgts,bkgth->bksh", exponentials, (grad / total).astype(value.dtype)),
        None,
    )


lean_attend.defvjp(lean_forward, lean_backward)


def in_groups(query: Float[Array, "B N T H"], key: Float[Array, "B K S _"]) -> Float[Array, "B K G T H"]:
    """Query heads grouped by the head of keys and values that they share."""
    batch, num_heads, length, width = query.shape
    return query.reshape(batch, key.shape[1], num_heads // key.shape[1], length, width)


def ungrouped(grouped: Float[Array, "B K G T V"]) -> Float[Array, "B N T V"]:
    return grouped.reshape(grouped.shape[0], -1, *grouped.shape[3:])


def _scores(query: Array, key: Array, mask: Array, scale: float, softcap: float | None) -> Float[Array, "B K G T S"]:
    """The scores whose gradient `lean_backward` computes."""
    scores = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
