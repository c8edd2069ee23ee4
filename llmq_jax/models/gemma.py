"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786), text, and Gemma 2 (Gemma Team 2024, arXiv:2408.00118), its predecessor.

Notable features, against Llama 3:
- layers of two kinds: local ones see a window of keys, global ones see all (`layer_types`); in Gemma 3 five local ones
  and a global one in turn, in Gemma 2 one and one
- two bases of RoPE in Gemma 3: that of global layers is larger, and they alone are scaled to longer contexts
- norms after each sub-layer too, not only before it; all are RMSNorm with a scale of 1 + w
- queries and keys are normalised, per head and before RoPE (Gemma 3); or attention's scores and the head's logits are
  soft-capped (Gemma 2: `attn_logit_softcapping`, `final_logit_softcapping`)
- scores are divided by the square root of `query_pre_attn_scalar`, which need not be the width of a head
- GeGLU instead of SwiGLU, with the tanh form of GELU
- embeddings times sqrt(D), a factor rounded to the type of the weights; the tied head reads them without the factor

Reference: google-deepmind/gemma and transformers' `Gemma3ForCausalLM`, `Gemma2ForCausalLM`. Deviations: none by
default. Gemma 3 with `attn_logit_softcapping` caps its scores; transformers has that field too, and does not read it.
`norm="dyt"` puts Dynamic Tanh in place of the norms.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from llmq_jax.field_types import check_fields
from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.attention import Context
from llmq_jax.layers.caches import Cache
from llmq_jax.layers.moe import Experts, experts_from
from llmq_jax.layers.norms import NORMS, norm_layer
from llmq_jax.layers.positions import Rope
from llmq_jax.models.config import (
    GLOBAL,
    LOCAL,
    ROPE_FIELDS,
    KindsOfLayers,
    require,
    require_at_least,
    require_one_of,
    require_positive,
    require_rates,
    set_layer_types,
    set_rope,
)
from llmq_jax.models.decoder import Decoder
from llmq_jax.models.heads import Labels, set_labels
from llmq_jax.models.layer_groups import LayerGroup, layers_in_groups
from llmq_jax.models.llama3 import GroupedQueryAttention, Llama3Block

FAST, SLOW = Rope(rope_theta=10_000.0), Rope(rope_theta=1_000_000.0)


@dataclass(frozen=True)
class Gemma2Config(KindsOfLayers):
    """Fields bear transformers' names and defaults (Gemma 2 2B)."""

    model_type: ClassVar[str] = "gemma2"
    pattern: ClassVar[tuple[str, ...]] = (LOCAL, GLOBAL)
    """The kinds of layers, which repeat, where `layer_types` is None."""
    normalises_queries: ClassVar[bool] = False
    """Whether queries and keys are normalised."""
    attention_output_bias: ClassVar[bool | None] = None
    """As attention_bias."""
    mlp_bias: ClassVar[bool] = False

    vocab_size: int = 256000
    max_position_embeddings: int = 8192
    """Longest sequence."""
    hidden_size: int = 2304
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    """Heads of keys and values, each shared by equally many query heads."""
    head_dim: int = 256
    intermediate_size: int = 9216
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    layer_types: tuple[str, ...] | list[str] | None = None
    """"sliding_attention" (local) or "full_attention" (global) for each layer; None is the family's pattern."""
    sliding_window: int = 4096
    """Keys that a token of a local layer sees, its own among them."""
    query_pre_attn_scalar: int = 256
    """Scores are divided by its square root."""
    rope_parameters: Rope | dict[str, Any] = FAST
    """The base of RoPE and its scaling: one of `layers.positions`, or a dict as in config.json."""
    attn_logit_softcapping: float | None = 50.0
    """c: scores become c · tanh(scores / c), between -c and c; None leaves them as they are."""
    final_logit_softcapping: float | None = 30.0
    """c: logits become c · tanh(logits / c), between -c and c; None leaves them as they are."""
    attention_bias: bool = False
    """Whether queries, keys, values and attention's output have biases."""
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    norm: str = "zero_centred_rms_norm"
    """"zero_centred_rms_norm" (Gemma's), "rms_norm", "layer_norm" or "dyt"."""
    experts: Experts | dict[str, Any] | None = None
    """Experts in place of feed-forward networks, from a chosen layer on; a dict as in JSON."""
    labels: Labels = None
    """Names of the classes that the head tells apart; None is a language model."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least(
            1,
            self,
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "sliding_window",
            "query_pre_attn_scalar",
        )
        require(
            self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
            self,
            "num_key_value_heads",
            f"must divide num_attention_heads={self.num_attention_heads}",
        )
        require(self.head_dim % 2 == 0, self, "head_dim", "must be even: RoPE turns pairs of features")
        require_one_of(ACTIVATIONS, self, "hidden_activation")
        set_layer_types(self)
        require(
            LOCAL not in self.layer_kinds or self.sliding_window <= self.max_position_embeddings,
            self,
            "sliding_window",
            f"must be at most max_position_embeddings={self.max_position_embeddings}, or it hides nothing; shorten it",
        )
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            cap = getattr(self, name)
            require(cap is None or 0 < cap < math.inf, self, name, "must be positive and finite, or None")
        require_positive(self, "rms_norm_eps", "initializer_range")
        require_rates(self, "attention_dropout")
        require_one_of(NORMS, self, "norm")
        set_rope(self, "rope_parameters", self.head_dim)
        object.__setattr__(self, "experts", experts_from(self.experts, self.num_hidden_layers))
        set_labels(self)

    @property
    def hidden_act(self) -> str:
        """`hidden_activation`, by the name that Llama's block reads."""
        return self.hidden_activation

    @property
    def head_width(self) -> int:
        """`head_dim`, by the name that Llama's attention reads."""
        return self.head_dim

    @property
    def key_value_heads(self) -> int:
        """`num_key_value_heads`, by the name that Llama's attention reads."""
        return self.num_key_value_heads

    @property
    def usual_layer_types(self) -> tuple[str, ...]:
        """The kind of each layer where `layer_types` is None: the pattern, written out."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.num_hidden_layers))

    @property
    def rope(self) -> Rope:
        """`rope_parameters`, which `__post_init__` converts if it is a dict."""
        assert isinstance(self.rope_parameters, Rope)
        return self.rope_parameters

    @property
    def local_rope(self) -> Rope:
        """The rope of local layers."""
        return self.rope


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """What differs from Gemma 2, defaults included."""

    model_type: ClassVar[str] = "gemma3_text"
    pattern: ClassVar[tuple[str, ...]] = (LOCAL,) * 5 + (GLOBAL,)
    normalises_queries: ClassVar[bool] = True

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    rope_parameters: Rope | dict[str, Any] = SLOW
    """The base of RoPE in global layers, and its scaling; or, as in transformers, a dict of both kinds' parameters:
    {"full_attention": ..., "sliding_attention": ...}."""
    local_rope_parameters: Rope | dict[str, Any] = FAST
    """The base of RoPE and its scaling in local layers: one of `layers.positions`, or a dict as in config.json."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        self._take_ropes_by_kind()
        super().__post_init__()
        set_rope(self, "local_rope_parameters", self.head_dim)

    def _take_ropes_by_kind(self) -> None:
        """Part `rope_parameters` that are, as in transformers, an object of both kinds' parameters."""
        given = self.rope_parameters
        if isinstance(given, dict) and given.keys() & ROPE_FIELDS.keys():
            rule = f"must have {' and '.join(ROPE_FIELDS)} alone"
            require(given.keys() == ROPE_FIELDS.keys(), self, "rope_parameters", rule)
            rule = f"stands beside rope_parameters.{LOCAL}; give one of them"
            require(self.local_rope_parameters == FAST, self, "local_rope_parameters", rule)
            for kind, name in ROPE_FIELDS.items():
                object.__setattr__(self, name, given[kind])

    @property
    def local_rope(self) -> Rope:
        assert isinstance(self.local_rope_parameters, Rope)
        return self.local_rope_parameters


class Gemma(Decoder):
    """Scaled token embeddings, blocks of two kinds, final norm, tied head. Gemma 2 or 3, by its config."""

    config: Gemma2Config

    def setup(self) -> None:
        c = self.config
        self.set_embedding(c.hidden_size**0.5)
        self.set_groups()
        self.final_norm = norm_layer(c.norm, c.rms_norm_eps, c.hidden_size, c.initializer_range)
        self.set_head()

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        c = self.config
        block = partial(GemmaBlock, c, self.dtype)
        return layers_in_groups(block, c.num_hidden_layers, self.experts, window=c.layer_windows)

    @nn.nowrap
    def context(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Context:
        c = self.config
        rotation, local_rotation = (
            rope.rotation(positions, c.head_dim, segment_ids) for rope in (c.rope, c.local_rope)
        )
        return Context(positions, segment_ids, rotation, local_rotation)

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        logits, cap = super().unembed(hidden), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class GemmaBlock(Llama3Block):
    """`x + norm(attention(norm(x)))`, then `x + norm(mlp(norm(x)))`. With a `window` it is a local layer."""

    config: Gemma2Config  # type: ignore[assignment]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None = None
    ) -> tuple[Array, Cache | None, dict[str, Any]]:
        c = self.config
        norm = partial(norm_layer, c.norm, c.rms_norm_eps, c.hidden_size, c.initializer_range)
        if self.window is not None:
            context = context.replace(rotation=context.local_rotation)
        mixed, cache = self.attention_layer()(norm("attention_norm", before_attention=True)(x), context, cache)
        x = x + norm("post_attention_norm")(mixed)
        update, counts = self.feed_forward(norm("mlp_norm")(x), context)
        return x + norm("post_mlp_norm")(update), cache, counts

    @nn.nowrap
    def attention_layer(self) -> nn.Module:
        """Llama's, with another scale and a softcap."""
        c = self.config
        scale, softcap = c.query_pre_attn_scalar**-0.5, c.attn_logit_softcapping
        return GroupedQueryAttention(c, self.dtype, self.window, scale, softcap, name="attention")


LONG = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
PRESETS = {
    "gemma3-270m": Gemma3Config(
        vocab_size=262144,
        max_position_embeddings=32768,
        hidden_size=640,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=2048,
        sliding_window=512,
    ),
    "gemma3-1b": Gemma3Config(
        vocab_size=262144,
        max_position_embeddings=32768,
        hidden_size=1152,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=6912,
        sliding_window=512,
    ),
    "gemma3-4b": Gemma3Config(
        hidden_size=2560,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=10240,
        sliding_window=1024,
        rope_parameters=LONG,
    ),
    "gemma3-12b": Gemma3Config(
        hidden_size=3840,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=15360,
        sliding_window=1024,
        rope_parameters=LONG,
    ),
    "gemma3-27b": Gemma3Config(
        hidden_size=5376,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=21504,
        sliding_window=1024,
        query_pre_attn_scalar=168,
        rope_parameters=LONG,
    ),
    "gemma2-2b": Gemma2Config(),
    "gemma2-9b": Gemma2Config(
        hidden_size=3584,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=14336,
    ),
    "gemma2-27b": Gemma2Config(
        hidden_size=4608,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=36864,
        query_pre_attn_scalar=144,
    ),
    # To train from bytes, on a laptop.
    "gemma3-10m": Gemma3Config(
        vocab_size=257,
        max_position_embeddings=256,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        sliding_window=64,
        query_pre_attn_scalar=64,
    ),
}
