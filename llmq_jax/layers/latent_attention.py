"""Multi-head latent attention (MLA; DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2.1).

The keys and values of all heads are formed from one short latent vector c^KV per token. A cache holds c^KV and k^R
alone. By the paper's equations, with the variable and the module here:

    c^KV = norm(W^DKV x)                     eq. 9         `latent`, R features        latent_down: [W^DKV; W^KR]
    k^R = RoPE(W^KR x)                       eq. 15        `shared_key`, for all heads
    c^Q = norm(W^DQ x)                       eq. 12        `query`, or x itself        query_down: W^DQ
    [q^C; q^R] = [W^UQ c^Q; RoPE(W^QR c^Q)]  eq. 13, 14    `content`, `rotary`         query_up, or query: [W^UQ; W^QR]
    [k^C; v^C] = [W^UK; W^UV] c^KV           eq. 10, 11    `keys`, `values`            latent_up: [W^UK; W^UV]
    o = softmax(scale · q · k) v^C           eq. 18        `mixed`
    u = W^O o                                eq. 19                                    out: W^O

with q = [q^C; q^R] and k = [k^C; k^R]; q, k^C, v^C and o are those of one head. Matrices in brackets are one product,
as in DeepSeek's checkpoints; the norms are those of section 3.1.2. RoPE has features of its own because a rotation
between q^C and W^UK, different for each distance, would keep W^UK from being absorbed (section 2.1.3). Attention is
computed in one of two forms:

- expanded (training, prompts): each head's keys and values are formed, and attention is that of any other model;
- absorbed (decoding): q^C · W^UK c = (W^UKᵀ q^C) · c, and Σ w (W^UV c) = W^UV Σ w c, with c for c^KV and w for the
  softmax's weights. So queries attend to the latents themselves, as to the single head of keys and values of
  multi-query attention, and nothing is expanded (section 2.1.2). With attention="plain", decoding is expanded too: from
  the latents in the cache.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from llmq_jax.layers.attention import Context, plain_attention, reads_plainly, self_attention
from llmq_jax.layers.axes import target_platform
from llmq_jax.layers.caches import LatentCache
from llmq_jax.layers.linear import KERNEL, Linear, by_input, flat_by_output, side_by_side
from llmq_jax.layers.lora import MAGNITUDE, adapters, factors, magnitude_ratio
from llmq_jax.layers.norms import RMSNorm
from llmq_jax.layers.scaled_dot_product import visible


@dataclass(frozen=True)
class LatentSizes:
    """The sizes of latent attention; transformers' names in brackets."""

    num_heads: int
    query_rank: int | None
    """Features of the latent from which queries are formed; None forms them from x (q_lora_rank)."""
    latent_rank: int
    """Features of the latent from which keys and values are formed (kv_lora_rank)."""
    content_width: int
    """Features of a head's queries and keys that are not rotated (qk_nope_head_dim)."""
    rotary_width: int
    """Features of a head's queries and keys that are rotated (qk_rope_head_dim)."""
    value_width: int
    """Features of a head's values (v_head_dim)."""

    @property
    def key_width(self) -> int:
        return self.content_width + self.rotary_width

    @property
    def cached_width(self) -> int:
        """Features that a cache holds per token."""
        return self.latent_rank + self.rotary_width


class LatentAttention(nn.Module):
    """`use_bias` gives biases to the down projections and the output, `up_bias` to the projections that form heads."""

    sizes: LatentSizes
    scale: float
    """What scores are multiplied by."""
    interleaved: bool
    """Whether RoPE rotates pairs of neighbouring features (DeepSeek), or of features half a head apart."""
    use_bias: bool
    up_bias: bool
    epsilon: float
    """Added to the mean square in the norms of the latents."""
    kernel_init: Initializer
    dropout_rate: float = 0.0
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LatentCache | None = None
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        assert context.rotation is not None
        s, rotate, linear = self.sizes, context.rotation.apply, self.linear
        latent_down = linear(s.cached_width, "latent_down", self.use_bias)
        heads = (s.num_heads, s.key_width)
        if s.query_rank is None:
            query, down = side_by_side(x, linear(heads, "query", self.up_bias), latent_down)
        else:
            query, down = side_by_side(x, linear(s.query_rank, "query_down", self.use_bias), latent_down)
            query = RMSNorm(self.epsilon, name="query_norm")(query)
            query = linear(heads, "query_up", self.up_bias)(query)
        content, rotary = jnp.split(query, [s.content_width], axis=-1)
        rotary = rotate(rotary, self.interleaved)
        latent, shared_key = jnp.split(down, [s.latent_rank], axis=-1)
        latent = RMSNorm(self.epsilon, name="latent_norm")(latent)
        shared_key = rotate(shared_key[:, :, None], self.interleaved)  # [B, T, 1, rotary]

        if cache is not None:
            stored = jnp.concatenate([latent, shared_key[:, :, 0]], axis=-1)
            was_empty, cache = cache.empty, cache.write(stored, context.positions, context.segment_ids)
        if cache is None or was_empty:
            mixed = self.expanded(content, rotary, latent, shared_key, context)
        elif reads_plainly(context.implementation, windowed=False):
            mixed = self.expanded_from(cache, content, rotary, context)
        else:
            mixed = self.absorbed(content, rotary, context, cache)
        mixed = mixed.reshape(*x.shape[:2], s.num_heads * s.value_width)
        return linear(x.shape[-1], "out", self.use_bias)(mixed), cache

    @nn.nowrap
    def linear(self, features: int | tuple[int, int], name: str, use_bias: bool) -> Linear:
        return Linear(features, use_bias, self.kernel_init, self.dtype, name=name)

    def expanded(
        self,
        content: Float[Array, "B T N _"],
        rotary: Float[Array, "B T N _"],
        latent: Float[Array, "B T R"],
        shared_key: Float[Array, "B T 1 _"],
        context: Context,
    ) -> Float[Array, "B T N V"]:
        """Attention of the sequence to itself, with each head's keys and values formed from the latents."""
        return self_attention(
            *self.expand(content, rotary, latent, shared_key),
            context,
            scale=self.scale,
            dropout_rate=self.dropout_rate,
            dropout_key=self.make_rng("dropout") if self.has_rng("dropout") else None,
        ).swapaxes(1, 2)

    def expanded_from(
        self, cache: LatentCache, content: Float[Array, "B T N _"], rotary: Float[Array, "B T N _"], context: Context
    ) -> Float[Array, "B T N V"]:
        """The same from the latents in a cache, for attention="plain"."""
        latents, places = cache.read()
        latent, shared_key = jnp.split(latents.astype(content.dtype), [self.sizes.latent_rank], axis=-1)
        query, key, value = self.expand(content, rotary, latent, shared_key[:, :, None])
        return plain_attention(query, key, value, (context.positions, places), scale=self.scale).swapaxes(1, 2)

    def expand(
        self,
        content: Float[Array, "B T N _"],
        rotary: Float[Array, "B T N _"],
        latent: Float[Array, "B S R"],
        shared_key: Float[Array, "B S 1 _"],
    ) -> tuple[Float[Array, "B N T H"], Float[Array, "B N S H"], Float[Array, "B N S V"]]:
        """Queries, and the keys and values formed from latents, with heads before positions."""
        s = self.sizes
        up = self.linear((s.num_heads, s.content_width + s.value_width), "latent_up", self.up_bias)(latent)
        keys, values = jnp.split(up, [s.content_width], axis=-1)
        shared_key = jnp.broadcast_to(shared_key, (*keys.shape[:3], s.rotary_width))
        query = jnp.concatenate([content, rotary], axis=-1)
        key = jnp.concatenate([keys, shared_key], axis=-1)
        return query.swapaxes(1, 2), key.swapaxes(1, 2), values.swapaxes(1, 2)

    def absorbed(
        self, content: Float[Array, "B T N _"], rotary: Float[Array, "B T N _"], context: Context, cache: LatentCache
    ) -> Float[Array, "B T N V"]:
        """Attention to the latents in a cache. The keys' bias is left out: it adds the same to all scores of a query,
        which the softmax cancels."""
        to_keys, to_values = self.halves_of_latent_up(content.dtype)
        query = jnp.concatenate([to_keys.transposed(content), rotary], axis=-1)
        latents, places = cache.read()
        mixed = attend_to_latents(query, latents, visible(context.positions, places), self.scale)
        values = to_values(mixed[..., : self.sizes.latent_rank])
        if not self.up_bias:
            return values
        bias: Array = self.variables["params"]["latent_up"]["bias"]
        return values + bias[:, self.sizes.content_width :].astype(values.dtype)

    def halves_of_latent_up(self, dtype: Dtype) -> tuple["HeadsOfLatents", "HeadsOfLatents"]:
        """(W^UK, W^UV), each with its half of an adapter."""
        s, up = self.sizes, self.variables["params"]["latent_up"]
        kernel = flat_by_output(up).astype(dtype).reshape(s.num_heads, -1, s.latent_rank)
        matrices = jnp.split(kernel, [s.content_width], axis=1)
        adapter = adapters(dict(self.variables)).get(("latent_up", KERNEL))
        if adapter is None:
            return HeadsOfLatents(matrices[0]), HeadsOfLatents(matrices[1])
        first, last = factors(*adapter)
        ratios: list[Any] = [None, None]
        if MAGNITUDE in adapter[0]:
            whole = by_input(up, (s.latent_rank, *last.shape[1:]))
            ratios = jnp.split(magnitude_ratio(whole, first, last, *adapter), [s.content_width], axis=-1)
        lasts = jnp.split(last.astype(dtype), [s.content_width], axis=-1)
        keys, values = (
            HeadsOfLatents(matrix, (first.astype(dtype), last), ratio)
            for matrix, last, ratio in zip(matrices, lasts, ratios, strict=True)
        )
        return keys, values


@dataclass(frozen=True)
class HeadsOfLatents:
    """The map from latents to the content of each head's keys, or to its values: W + A B, or with DoRA its rows times
    a ratio. W and the adapter's matrices are applied beside each other, and A B is never formed."""

    matrices: Float[Array, "N _ R"]
    low_rank: tuple[Float[Array, "R A"], Float[Array, "A N _"]] | None = None
    ratio: Float[Array, "N _"] | None = None

    def __call__(self, latents: Float[Array, "B T N R"]) -> Float[Array, "B T N _"]:
        heads = jnp.einsum("btnr,nvr->btnv", latents, self.matrices)
        if self.low_rank is not None:
            first, last = self.low_rank
            heads += jnp.einsum("btna,anv->btnv", latents @ first, last)
        return heads if self.ratio is None else (heads * self.ratio).astype(heads.dtype)

    def transposed(self, heads: Float[Array, "B T N _"]) -> Float[Array, "B T N R"]:
        """From heads back to latents."""
        heads = heads if self.ratio is None else (heads * self.ratio).astype(heads.dtype)
        latents = jnp.einsum("btnh,nhr->btnr", heads, self.matrices)
        if self.low_rank is not None:
            first, last = self.low_rank
            latents += jnp.einsum("btnh,anh->btna", heads, last) @ first.T
        return latents


def attend_to_latents(
    query: Float[Array, "B T N C"], latents: Float[Array, "B S C"], mask: Bool[Array, "B T S"], scale: float
) -> Float[Array, "B T N C"]:
    """Multi-query attention with the cached features as keys and as values. The first R features of the result are the
    mixed latents; the rest, mixed rotated keys, is of no use."""
    batch, length, heads, width = query.shape
    rows = query.reshape(batch, length * heads, width)
    if target_platform() == "cpu":  # q Cᵀ, formed as (C qᵀ)ᵀ: its backend then transposes the small arrays, not C.
        scores = jnp.einsum("bsc,bmc->bsm", latents, rows, preferred_element_type=jnp.float32).mT
    else:  # A GPU's softmax is one kernel if the scores of a query lie side by side.
        scores = jnp.einsum("bmc,bsc->bms", rows, latents, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores.reshape(batch, length, heads, -1) * scale, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(latents.dtype).reshape(batch, length * heads, -1)
    return jnp.einsum("bms,bsc->bmc", weights, latents).reshape(query.shape)
