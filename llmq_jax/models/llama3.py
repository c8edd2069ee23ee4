"""Llama 3 (Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783), and architectures built like it.

Notable features, each in place of one of GPT-2's:
- rotary position embeddings (RoPE) on queries and keys, in every layer; no table of positions
- RMSNorm instead of layer norm: no mean, no bias
- grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): several query heads share a head of keys and values
- SwiGLU instead of GELU, three matrices instead of two
- no biases, unless a config asks for them (in attention, in the feed-forward network); no dropout on the stream
- output head of its own, or tied (Llama 3.2 1B and 3B, SmolLM2)
- long contexts by scaling the frequencies of RoPE (`rope_parameters`)

Reference: meta-llama/llama-models and transformers' `LlamaForCausalLM`. Deviations: none by default. `norm="dyt"` puts
Dynamic Tanh in place of the norms.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from llmq_jax.field_types import check_fields
from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.attention import Context, attention
from llmq_jax.layers.caches import Cache, FullCache, RingCache
from llmq_jax.layers.linear import Linear, side_by_side
from llmq_jax.layers.moe import Experts, experts_from, mlp_or_experts
from llmq_jax.layers.norms import NORMS, norm_layer
from llmq_jax.layers.positions import Rope
from llmq_jax.models.config import require, require_at_least, require_one_of, require_positive, require_rates, set_rope
from llmq_jax.models.decoder import Decoder
from llmq_jax.models.heads import Labels, set_labels
from llmq_jax.models.layer_groups import LayerGroup, layers_in_groups

DEFAULT_ROPE = Rope()


@dataclass(frozen=True)
class Llama3Config:
    """Fields bear transformers' names and defaults (Llama 7B); the sizes people use are presets."""

    model_type: ClassVar[str] = "llama"
    normalises_queries: ClassVar[bool] = False
    """Whether queries and keys are normalised, per head and before RoPE (Qwen 3)."""

    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    """Longest sequence."""
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    """Heads of keys and values, each shared by equally many query heads; None is one for each query head. Code reads
    `key_value_heads`, which is never None."""
    head_dim: int | None = None
    """Width of a head; None is hidden_size / num_attention_heads, and a given value equal to that is held as None. Code
    reads `head_width`, which is never None."""
    intermediate_size: int = 11008
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: Rope | dict[str, Any] = DEFAULT_ROPE
    """The base of RoPE and its scaling: one of `layers.positions`, or a dict as in config.json."""
    attention_bias: bool = False
    """Whether queries, keys, values and attention's output have biases."""
    attention_output_bias: bool | None = None
    """Whether attention's output has a bias; None is as attention_bias. It is the only one of the original repository's
    Llama."""
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    norm: str = "rms_norm"
    """"layer_norm", "rms_norm", "zero_centred_rms_norm" or "dyt" (Dynamic Tanh)."""
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
            "intermediate_size",
        )
        # A value equal to the default is held as None: so equal models have equal configs, and `override` of the width
        # or of the number of heads changes what follows from it.
        for name, default in (
            ("num_key_value_heads", self.num_attention_heads),
            ("head_dim", self.hidden_size / self.num_attention_heads),
            ("attention_output_bias", self.attention_bias),
        ):
            if getattr(self, name) == default:
                object.__setattr__(self, name, None)
        require(
            self.key_value_heads > 0 and self.num_attention_heads % self.key_value_heads == 0,
            self,
            "num_key_value_heads",
            f"must divide num_attention_heads={self.num_attention_heads}",
        )
        require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            self,
            "num_attention_heads",
            f"must divide hidden_size={self.hidden_size}, unless head_dim is given",
        )
        width = self.head_width
        rule = f"gives heads of {width} features, but RoPE turns pairs"
        require(width > 0 and width % 2 == 0, self, "head_dim", rule)
        require_one_of(ACTIVATIONS, self, "hidden_act")
        require_positive(self, "rms_norm_eps", "initializer_range")
        require_rates(self, "attention_dropout")
        require_one_of(NORMS, self, "norm")
        set_rope(self, "rope_parameters", self.head_width)
        object.__setattr__(self, "experts", experts_from(self.experts, self.num_hidden_layers))
        set_labels(self)

    @property
    def rope(self) -> Rope:
        """`rope_parameters`, which `__post_init__` converts if it is a dict."""
        assert isinstance(self.rope_parameters, Rope)
        return self.rope_parameters

    @property
    def head_width(self) -> int:
        """Width of a head, H."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, K."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Keys that a token sees in each layer; None is all. Architectures derived from this one may have windows
        (Mistral)."""
        return (None,) * self.num_hidden_layers


class Llama3(Decoder):
    """Token embeddings, equal blocks, final norm, head."""

    config: Llama3Config

    def setup(self) -> None:
        c = self.config
        self.set_embedding()
        self.set_groups()
        self.final_norm = norm_layer(c.norm, c.rms_norm_eps, c.hidden_size, c.initializer_range)
        self.set_head()

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        c = self.config
        block = partial(Llama3Block, c, self.dtype)
        return layers_in_groups(block, c.num_hidden_layers, self.experts, window=c.layer_windows)

    @nn.nowrap
    def context(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Context:
        rope = self.config.rope
        return Context(positions, segment_ids, rope.rotation(positions, self.config.head_width, segment_ids))


class Llama3Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    config: Llama3Config
    dtype: Dtype | None = None
    window: int | None = None
    """Keys that a token sees, its own among them; None is all."""
    experts: Experts | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None = None
    ) -> tuple[Array, Cache | None, dict[str, Any]]:
        c = self.config
        norm = partial(norm_layer, c.norm, c.rms_norm_eps, c.hidden_size, c.initializer_range)
        mixed, cache = self.attention_layer()(norm("attention_norm", before_attention=True)(x), context, cache)
        x = x + mixed
        update, counts = self.feed_forward(norm("mlp_norm")(x), context)
        return x + update, cache, counts

    @nn.nowrap
    def attention_layer(self) -> nn.Module:
        """Called as `(x, context, cache) -> (what is added to the residual stream, cache)`."""
        return GroupedQueryAttention(self.config, self.dtype, self.window, name="attention")

    @nn.nowrap
    def feed_forward(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """SwiGLU (GeGLU in Gemma), or experts: (what is added to the residual stream, the block's counts)."""
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        return mlp_or_experts(
            x,
            context,
            self.experts,
            intermediate_size=c.intermediate_size,
            gated=True,
            activation=c.hidden_act,
            use_bias=c.mlp_bias,
            kernel_init=normal,
            down_init=normal,
            dtype=self.dtype,
        )

    @nn.nowrap
    def create_cache(self, batch: int, length: int, dtype: Dtype, lookahead: int = 0) -> Cache:
        c = self.config
        if self.window is None:
            return FullCache.create(batch, length, c.key_value_heads, c.head_width, dtype)
        return RingCache.create(batch, length, self.window, lookahead, c.key_value_heads, c.head_width, dtype)


class GroupedQueryAttention(nn.Module):
    """RoPE on queries and keys; query head n reads the head n // (N / K) of keys and values."""

    config: Any
    """A Llama3Config, or another that has the same names."""
    dtype: Dtype | None = None
    window: int | None = None
    scale: float | None = None
    """What scores are multiplied by; None is 1 / sqrt(H)."""
    softcap: float | None = None
    """c: scores become c · tanh(scores / c); None leaves them as they are."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: FullCache | RingCache | None = None
    ) -> tuple[Array, FullCache | RingCache | None]:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)

        def heads(count: int, name: str) -> Linear:
            features = (count, c.head_width)
            return Linear(features, c.attention_bias, normal, self.dtype, name=name)  # [B, T, count, H]

        query, key, value = side_by_side(  # three products, or one where decoding has joined the kernels
            x,
            heads(c.num_attention_heads, "query"),
            heads(c.key_value_heads, "key"),
            heads(c.key_value_heads, "value"),
        )
        if c.normalises_queries:
            norm = partial(norm_layer, c.norm, c.rms_norm_eps, c.head_width, c.initializer_range)
            query, key = norm("query_norm")(query), norm("key_norm")(key)
        assert context.rotation is not None
        mixed, cache = attention(
            context.rotation.apply(query),
            context.rotation.apply(key),
            value,
            context,
            cache,
            scale=c.head_width**-0.5 if self.scale is None else self.scale,
            window=self.window,
            softcap=self.softcap,
            dropout_rate=c.attention_dropout,
            dropout_key=self.make_rng("dropout") if self.has_rng("dropout") else None,
        )
        bias = c.attention_bias if c.attention_output_bias is None else c.attention_output_bias
        out = Linear(c.hidden_size, bias, normal, self.dtype, name="out")
        return out(mixed.reshape(*x.shape[:2], c.num_attention_heads * c.head_width)), cache


LLAMA_3_2_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
PRESETS = {
    "llama3.2-1b": Llama3Config(
        **LLAMA_3,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        intermediate_size=8192,
        rope_parameters=LLAMA_3_2_ROPE,
        tie_word_embeddings=True,
    ),
    "llama3.2-3b": Llama3Config(
        **LLAMA_3,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        intermediate_size=8192,
        rope_parameters=LLAMA_3_2_ROPE,
        tie_word_embeddings=True,
    ),
    "llama3.1-8b": Llama3Config(
        **LLAMA_3,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=14336,
        rope_parameters={**LLAMA_3_2_ROPE, "factor": 8.0},
    ),
    "smollm2-135m": Llama3Config(
        **SMOLLM2,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        initializer_range=1 / 24,
    ),
    "smollm2-360m": Llama3Config(
        **SMOLLM2,
        hidden_size=960,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        intermediate_size=2560,
    ),
    "smollm2-1.7b": Llama3Config(
        **{**SMOLLM2, "rope_parameters": {"rope_theta": 130_000.0}},
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=8192,
    ),
    # To train from bytes, on a laptop.
    "llama-10m": Llama3Config(
        vocab_size=257,
        max_position_embeddings=256,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
}
