"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Notable features:
- learned position embeddings, added to the token embeddings
- layer norm before each sub-layer, and once after the last layer
- multi-head attention from one product for queries, keys and values, with biases everywhere
- GELU in its tanh form
- dropout on embeddings, attention weights and residual branches
- output head tied to the token embeddings
- initialisation: normal(0.02), residual projections scaled by 1/sqrt(2 · layers), position embeddings normal(0.01)

Reference: openai/gpt-2 `src/model.py` and transformers' `GPT2LMHeadModel`. Deviations: none by default;
`activation_function="gelu"` computes the exact GELU, `norm="dyt"` puts Dynamic Tanh in place of the norms,
`scale_attn_by_inverse_layer_idx` divides scores by the layer's number, each layer then being compiled by itself.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from llmq_jax.field_types import check_fields
from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.attention import Context, attention
from llmq_jax.layers.caches import FullCache
from llmq_jax.layers.embedding import Embedding
from llmq_jax.layers.linear import Linear
from llmq_jax.layers.moe import Experts, experts_from, mlp_or_experts
from llmq_jax.layers.norms import NORMS, norm_layer
from llmq_jax.models.config import require, require_at_least, require_one_of, require_positive, require_rates
from llmq_jax.models.decoder import Decoder
from llmq_jax.models.heads import Labels, set_labels
from llmq_jax.models.layer_groups import LayerGroup, layers_in_groups


@dataclass(frozen=True)
class GPT2Config:
    """Fields bear transformers' names; the defaults are GPT-2 124M."""

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    """Longest sequence."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    """Width of the feed-forward network; None is 4 times hidden_size."""
    activation_function: str = "gelu_new"
    """"gelu_new" is GELU's tanh form, "gelu" the exact one."""
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    """Whether layer l, counted from 1, divides its scores by l too (Mistral's GPT-2, stanford-crfm)."""
    norm: str = "layer_norm"
    """"layer_norm", "rms_norm", "zero_centred_rms_norm" or "dyt" (Dynamic Tanh)."""
    experts: Experts | dict[str, Any] | None = None
    """Experts in place of feed-forward networks, from a chosen layer on; a dict as in JSON."""
    labels: Labels = None
    """Names of the classes that the head tells apart; None is a language model."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least(1, self, "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers")
        require(self.mlp_width > 0, self, "intermediate_size", "must be at least 1")
        require(
            self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0,
            self,
            "num_attention_heads",
            f"must divide hidden_size={self.hidden_size}",
        )
        require_one_of(ACTIVATIONS, self, "activation_function")
        require_positive(self, "layer_norm_epsilon", "initializer_range")
        require_one_of(NORMS, self, "norm")
        require_rates(self, "embd_pdrop", "attn_pdrop", "resid_pdrop")
        object.__setattr__(self, "experts", experts_from(self.experts, self.num_hidden_layers))
        set_labels(self)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward networks."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @property
    def residual_range(self) -> float:
        """Initial standard deviation of the matrices whose output is added to the residual stream. The variances of the
        2L branches add up: scaled by 1 / sqrt(2L), their sum is that of one branch."""
        return self.initializer_range / math.sqrt(2 * self.num_hidden_layers)


class GPT2(Decoder):
    """Token and position embeddings, equal blocks, final norm, tied head."""

    config: GPT2Config

    def setup(self) -> None:
        c = self.config
        self.set_embedding()
        # The original initialises positions at half the scale of tokens (0.01 against 0.02).
        half = nn.initializers.normal(c.initializer_range / 2)
        self.position_embedding = Embedding(c.max_position_embeddings, c.hidden_size, half, self.dtype, rows=None)
        self.embedding_dropout = nn.Dropout(c.embd_pdrop)
        self.set_groups()
        self.final_norm = norm_layer(c.norm, c.layer_norm_epsilon, c.hidden_size, c.initializer_range)
        self.set_head()

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        c = self.config
        layers = range(1, c.num_hidden_layers + 1)
        divisors = [layer if c.scale_attn_by_inverse_layer_idx else None for layer in layers]
        block = partial(GPT2Block, c, self.dtype)
        return layers_in_groups(block, c.num_hidden_layers, self.experts, scores_divided_by=divisors)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.scale_embedded(self.token_embedding(tokens) + self.position_embedding(positions))
        dropped: Array = self.embedding_dropout(x, deterministic=not self.has_rng("dropout"))
        return dropped


class GPT2Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    config: GPT2Config
    dtype: Dtype | None = None
    experts: Experts | None = None
    scores_divided_by: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: FullCache | None = None
    ) -> tuple[Array, FullCache | None, dict[str, Any]]:
        c = self.config
        deterministic = not self.has_rng("dropout")
        norm = partial(norm_layer, c.norm, c.layer_norm_epsilon, c.hidden_size, c.initializer_range)
        mixed, cache = self.attention_layer()(norm("attention_norm", before_attention=True)(x), context, cache)
        x = x + nn.Dropout(c.resid_pdrop)(mixed, deterministic=deterministic)
        update, counts = self.feed_forward(norm("mlp_norm")(x), context)
        x = x + nn.Dropout(c.resid_pdrop)(update, deterministic=deterministic)
        return x, cache, counts

    @nn.nowrap
    def attention_layer(self) -> nn.Module:
        """Called as `(x, context, cache) -> (what is added to the residual stream, cache)`."""
        return GPT2Attention(self.config, self.dtype, self.scores_divided_by, name="attention")

    @nn.nowrap
    def feed_forward(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Two matrices with GELU between, or experts: (what is added to the residual stream, the block's counts)."""
        c = self.config
        return mlp_or_experts(
            x,
            context,
            self.experts,
            intermediate_size=c.mlp_width,
            gated=False,
            activation=c.activation_function,
            use_bias=True,
            kernel_init=nn.initializers.normal(c.initializer_range),
            down_init=nn.initializers.normal(c.residual_range),
            dtype=self.dtype,
        )

    @nn.nowrap
    def create_cache(self, batch: int, length: int, dtype: Dtype, lookahead: int = 0) -> FullCache:
        return FullCache.create(batch, length, self.config.num_attention_heads, self.config.head_dim, dtype)


class GPT2Attention(nn.Module):
    """Multi-head attention; one product gives queries, keys and values."""

    config: GPT2Config
    dtype: Dtype | None = None
    scores_divided_by: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: FullCache | None = None
    ) -> tuple[Array, FullCache | None]:
        c = self.config
        normal, residual = (nn.initializers.normal(scale) for scale in (c.initializer_range, c.residual_range))
        qkv = Linear((3, c.num_attention_heads, c.head_dim), kernel_init=normal, dtype=self.dtype, name="qkv")(x)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, T, 3, N, H] to [B, T, N, H] each
        mixed, cache = attention(
            query,
            key,
            value,
            context,
            cache,
            scale=c.head_dim**-0.5 / self.scores_divided_by,
            dropout_rate=c.attn_pdrop,
            dropout_key=self.make_rng("dropout") if self.has_rng("dropout") else None,
        )
        out = Linear(c.hidden_size, kernel_init=residual, dtype=self.dtype, name="out")
        return out(mixed.reshape(*x.shape[:2], c.num_attention_heads * c.head_dim)), cache


PRESETS = {
    "gpt2-124m": GPT2Config(),
    "gpt2-355m": GPT2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "gpt2-774m": GPT2Config(hidden_size=1280, num_hidden_layers=36, num_attention_heads=20),
    "gpt2-1558m": GPT2Config(hidden_size=1600, num_hidden_layers=48, num_attention_heads=25),
}
