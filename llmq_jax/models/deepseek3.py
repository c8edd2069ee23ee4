"""DeepSeek V3 and R1 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437).

Notable features, against Llama 3:
- multi-head latent attention in place of grouped-query attention: a short latent per token in place of keys and values
  of every head (section 2.1.1; `layers.latent_attention`)
- fine-grained experts and a shared one in place of the feed-forward network, from the fourth layer on: sigmoid scores,
  a bias for selection that keeps the load even without a loss, groups of experts of which a token sees few
  (section 2.1.2; `layers.moe`)
- a second objective, multi-token prediction: D modules, each a block of the model's own kind, follow the last layer;
  each predicts one token further ahead than the one before (section 2.2; `objectives.multi_token`). In generation they
  can draft for the model itself
- YaRN, whose temperature multiplies the scores

Reference: transformers' `DeepseekV3ForCausalLM` and `MtpModel`, and DeepSeek's own code. Deviations: none in what is
computed from given weights; in training the balance loss is a mean over layers (docs/departures.md). The paper's module
k sees the first T - k tokens; here it runs over all T, and places without a token k further on are counted nowhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.field_types import check_fields
from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.attention import Context
from llmq_jax.layers.caches import Cache, LatentCache
from llmq_jax.layers.expert_balance import Balance
from llmq_jax.layers.latent_attention import LatentAttention, LatentSizes
from llmq_jax.layers.linear import Linear
from llmq_jax.layers.moe import Experts, balance_from, experts_from, require_same_sizes
from llmq_jax.layers.norms import NORMS, norm_layer
from llmq_jax.layers.positions import Rope, YarnRope, yarn_scale
from llmq_jax.models.config import require, require_at_least, require_one_of, require_positive, require_rates, set_rope
from llmq_jax.models.decoder import Output, Tokens, default_positions
from llmq_jax.models.heads import Labels, set_labels
from llmq_jax.models.layer_groups import LayerGroup, layers_in_groups
from llmq_jax.models.llama3 import DEFAULT_ROPE, Llama3, Llama3Block

MTP = "mtp"
BLOCK = "block_0"
# Epsilon of the norms inside latent attention, whatever rms_norm_eps says (as in transformers and DeepSeek's own code).
LATENT_EPSILON = 1e-6
# Which hidden state of the model, or of the module before it, a module of multi-token prediction reads.
MTP_HIDDEN = ("after_norm", "before_norm")
# Section 4.2: the speed of the bias for selection, and the coefficient of the sequence-wise balance loss, which here is
# the mean over layers.
PAPER_BALANCE = Balance(bias_rate=0.001, sequence=0.0001)


@dataclass(frozen=True)
class DeepSeekV3Config:
    """Fields bear transformers' names and defaults (V3); the sizes people use are presets."""

    model_type: ClassVar[str] = "deepseek_v3"
    mlp_bias: ClassVar[bool] = False

    vocab_size: int = 129280
    max_position_embeddings: int = 4096
    """Longest sequence."""
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    """Layers, those of multi-token prediction not counted."""
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    """Features of the latent from which queries are formed; None forms them from the hidden state."""
    kv_lora_rank: int = 512
    """Features of the latent from which keys and values are formed."""
    qk_nope_head_dim: int = 128
    """Features of a head's queries and keys without RoPE."""
    qk_rope_head_dim: int = 64
    """Features of a head's queries and keys with RoPE."""
    v_head_dim: int = 128
    """Features of a head's values."""
    intermediate_size: int = 18432
    """Width of the feed-forward networks of the first layers."""
    first_k_dense_replace: int = 3
    """How many of the first layers have a feed-forward network in place of experts."""
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    """Width of an expert."""
    n_shared_experts: int = 1
    """Experts that all tokens pass through."""
    n_group: int | None = 8
    """Groups of experts; None is one."""
    topk_group: int | None = 4
    """How many groups a token's experts may come from; None is one."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts add up to `routed_scaling_factor`."""
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    """Modules of multi-token prediction."""
    mtp_hidden: str = "after_norm"
    """Which hidden state modules of multi-token prediction read: that "after_norm", as in transformers, or
    "before_norm"."""
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: Rope | dict[str, Any] = DEFAULT_ROPE
    """The base of RoPE and its scaling: one of `layers.positions`, or a dict as in config.json."""
    rope_interleave: bool = True
    """Whether RoPE rotates neighbouring features; False is half-split."""
    attention_bias: bool = False
    """Whether the down projections and attention's output have biases."""
    attention_up_bias: bool = False
    """Whether the projections that form heads have biases. With these, with `attention_bias` and without
    `rope_interleave` this is the original repository's attention."""
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    norm: str = "rms_norm"
    """"layer_norm", "rms_norm", "zero_centred_rms_norm" or "dyt" (Dynamic Tanh)."""
    balance: Balance | dict[str, Any] | None = PAPER_BALANCE
    """What keeps the load of experts even in training."""
    experts: Experts | dict[str, Any] | None = None
    """A dict changes some of what the fields above say of the experts: {"dispatch": "ragged"}; `Experts` replace all of
    it, `balance` too."""
    labels: Labels = None
    """Names of the classes that the head tells apart; None is a language model. A classifier predicts no tokens: it has
    no modules of multi-token prediction, whatever num_nextn_predict_layers says."""

    def __post_init__(self) -> None:
        check_fields(self)
        set_labels(self)
        if self.labels is not None:
            object.__setattr__(self, "num_nextn_predict_layers", 0)
        for name in ("n_group", "topk_group"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, 1)
        require_at_least(
            1,
            self,
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "v_head_dim",
            "intermediate_size",
            "moe_intermediate_size",
        )
        require_at_least(0, self, "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
        depth, longest = self.num_nextn_predict_layers, self.max_position_embeddings
        require(depth <= 64, self, "num_nextn_predict_layers", "must be at most 64")
        rule = f"must be below max_position_embeddings={longest}: each module looks a token further"
        require(depth < longest, self, "num_nextn_predict_layers", rule)
        rank, rule = self.q_lora_rank, "must be at least 1; None makes queries without a latent"
        require(rank is None or rank > 0, self, "q_lora_rank", rule)
        width = self.qk_rope_head_dim
        require(width > 0 and width % 2 == 0, self, "qk_rope_head_dim", "must be even and above 0: RoPE turns pairs")
        require_one_of(ACTIVATIONS, self, "hidden_act")
        require_positive(self, "rms_norm_eps", "initializer_range")
        require_rates(self, "attention_dropout")
        require_one_of(NORMS, self, "norm")
        require_one_of(MTP_HIDDEN, self, "mtp_hidden")
        set_rope(self, "rope_parameters", width)
        object.__setattr__(self, "balance", balance_from(self.balance))
        sparse = self.first_k_dense_replace < self.num_hidden_layers
        if sparse:
            self._check_experts()
        given = experts_from(self.experts, self.num_hidden_layers, self.usual_experts)
        object.__setattr__(self, "experts", given)
        idle = not sparse and given is None and self.balance not in (None, PAPER_BALANCE)
        require(not idle, self, "balance", "has no effect on a model without experts")
        sizes = (self.n_routed_experts, self.num_experts_per_tok)
        require_same_sizes(given, sizes, self, "n_routed_experts and num_experts_per_tok")

    def _check_experts(self) -> None:
        require_at_least(1, self, "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
        require_positive(self, "routed_scaling_factor")
        experts, groups, top_groups = self.n_routed_experts, self.n_group or 1, self.topk_group or 1
        require(experts % groups == 0, self, "n_group", f"must divide n_routed_experts={experts}")
        require(top_groups <= groups, self, "topk_group", f"is more than n_group={groups}")
        seen = top_groups * experts // groups
        rule = f"is more than the {seen} experts of topk_group={self.topk_group} groups"
        require(self.num_experts_per_tok <= seen, self, "num_experts_per_tok", rule)

    @property
    def usual_experts(self) -> Experts | None:
        """The experts where `experts` is None: those that the other fields describe, or None where all layers are
        dense."""
        if self.first_k_dense_replace >= self.num_hidden_layers:
            return None
        return Experts(
            num_experts=self.n_routed_experts,
            top_k=self.num_experts_per_tok,
            intermediate_size=self.moe_intermediate_size,
            first_layer=self.first_k_dense_replace,
            num_shared=self.n_shared_experts,
            score="sigmoid",
            renormalise=self.norm_topk_prob,
            scaling_factor=self.routed_scaling_factor,
            selection_bias=True,
            num_groups=self.n_group or 1,
            top_groups=self.topk_group or 1,
            balance=self.balance,
        )

    @property
    def rope(self) -> Rope:
        """`rope_parameters`, which `__post_init__` converts if it is a dict."""
        assert isinstance(self.rope_parameters, Rope)
        return self.rope_parameters

    @property
    def latent_sizes(self) -> LatentSizes:
        """The sizes of multi-head latent attention."""
        return LatentSizes(
            self.num_attention_heads,
            self.q_lora_rank,
            self.kv_lora_rank,
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.v_head_dim,
        )

    @property
    def score_scale(self) -> float:
        """What attention's scores are multiplied by: 1 / sqrt(width of keys), times YaRN's temperature.

        DeepSeek applies the temperature here; rotated queries and keys are scaled by mscale / mscale_all_dim alone,
        which is 1 in its models.
        """
        scale: float = self.latent_sizes.key_width**-0.5
        if isinstance(self.rope, YarnRope) and self.rope.mscale_all_dim:
            scale *= yarn_scale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale


class Ahead(struct.PyTreeNode):
    """The results of the modules of multi-token prediction, stacked over the depths k = 1, ..., D."""

    hidden: Float[Array, "depth B T D"]
    """At place i of depth k, the hidden state that predicts token i + k + 1, after the module's norm."""
    caches: Any = None
    counts: Any = None


class DeepSeek3(Llama3):
    """Llama with other blocks, followed by the modules of multi-token prediction."""

    config: DeepSeekV3Config  # type: ignore[assignment]  # Its fields are not Llama's, and its blocks read them.

    def setup(self) -> None:
        super().setup()
        if self.config.num_nextn_predict_layers:
            self.mtp = self.scanned(PredictionStep, self.config.num_nextn_predict_layers)(self.prediction_module)

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        c = self.config
        return layers_in_groups(partial(DeepSeekBlock, c, self.dtype), c.num_hidden_layers, self.experts)

    @nn.nowrap
    def context(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Context:
        c = self.config
        rotation = c.rope.rotation(positions, c.qk_rope_head_dim, segment_ids)
        return Context(positions, segment_ids, rotation)

    @nn.nowrap
    def head_widths(self, cache: LatentCache) -> tuple[int, int]:
        return self.config.latent_sizes.key_width, self.config.v_head_dim

    def __call__(
        self, tokens: Tokens, positions: Tokens | None = None, segment_ids: Tokens | None = None
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        if self.is_initializing() and self.config.num_nextn_predict_layers:  # `init` gives all modules their parameters
            self.look_ahead(self.forward(tokens, positions, segment_ids), tokens, positions, segment_ids)
        return super().__call__(tokens, positions, segment_ids)

    # Multi-token prediction.

    @property
    def prediction_module(self) -> Callable[..., Any]:
        """The constructor of a module."""
        return partial(PredictionModule, self.config, self.dtype, experts=self.experts)

    def look_ahead(
        self,
        output: Output,
        tokens: Tokens,
        positions: Tokens | None = None,
        segment_ids: Tokens | None = None,
        ahead_tokens: Int[Array, "B depth T"] | None = None,
        ahead_segment_ids: Int[Array, "B depth T"] | None = None,
        caches: Any = None,
    ) -> Ahead:
        """Run the modules on the `output` of `forward` for the same tokens (eq. 21 and 22).

        Module k also sees the tokens k places further on, or those of `ahead_tokens` if given; `ahead_segment_ids` are
        then the documents that these belong to, 0 where there is none.
        """
        tokens, segment_ids = jnp.asarray(tokens), None if segment_ids is None else jnp.asarray(segment_ids)
        positions = default_positions(tokens, segment_ids) if positions is None else jnp.asarray(positions)
        context = self.context(positions, segment_ids).replace(implementation=self.attention)
        depths = range(1, self.config.num_nextn_predict_layers + 1)
        if ahead_tokens is None:
            embedded = self.embed(tokens, positions)
            embedded = jnp.stack([jnp.roll(embedded, -k, axis=1) for k in depths])  # [depth, B, T, D]
            real = jnp.stack([has_token_ahead(tokens, segment_ids, k) for k in depths])  # [depth, B, T]
            segments = jnp.where(real, jnp.int32(1) if segment_ids is None else segment_ids, 0)
        else:
            embedded = jnp.stack([self.embed(ahead_tokens[:, k - 1], positions) for k in depths])
            assert ahead_segment_ids is not None
            segments = ahead_segment_ids.swapaxes(0, 1)
        previous = self.before_modules(output)
        _, (hidden, new_caches, counts) = self.mtp(previous, (embedded, segments, caches), context)
        return Ahead(hidden, new_caches, counts)

    @nn.nowrap
    def before_modules(self, output: Output) -> Float[Array, "B T D"]:
        """h⁰: the model's hidden states, as the first module reads them."""
        return output.hidden if self.config.mtp_hidden == "after_norm" else output.before_norm

    def forward_and_ahead(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        segment_ids: Tokens | None = None,
        ahead_tokens: Int[Array, "B depth T"] | None = None,
        ahead_segment_ids: Int[Array, "B depth T"] | None = None,
    ) -> tuple[Output, Ahead]:
        """(`forward`, `look_ahead`) in one pass; the counts of both are in the first."""
        output = self.forward(tokens, positions, segment_ids)
        ahead = self.look_ahead(output, tokens, positions, segment_ids, ahead_tokens, ahead_segment_ids)
        return output.replace(counts={**output.counts, MTP: ahead.counts}), ahead

    def mtp_logits(
        self, tokens: Tokens, positions: Tokens | None = None, segment_ids: Tokens | None = None
    ) -> tuple[Float[Array, "B _ V"], ...]:
        """For each depth k from 1 on, logits [B, T - k, V] in float32: at place i those of token i + k + 1."""
        _, ahead = self.forward_and_ahead(tokens, positions, segment_ids)
        return tuple(self.unembed(hidden[:, :-k]) for k, hidden in enumerate(ahead.hidden, start=1))

    @nn.nowrap
    def all_layer_paths(self) -> tuple[tuple[tuple[str, str], int], ...]:
        ahead = tuple(((MTP, BLOCK), depth) for depth in range(self.config.num_nextn_predict_layers))
        return (*self.layer_paths(), *ahead)

    @nn.nowrap
    def create_ahead_caches(self, batch: int, length: int, dtype: Dtype) -> tuple[LatentCache, ...]:
        """Empty caches, one for each module."""
        module = self.prediction_module(parent=None)
        return tuple(module.create_cache(batch, length, dtype) for _ in range(self.config.num_nextn_predict_layers))

    @nn.nowrap
    def decode_ahead(
        self,
        outside: dict[str, Any],
        module: dict[str, Any],
        previous: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: LatentCache,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], LatentCache]:
        """One module, by its sliced variables: (hidden state to unembed, `previous` of the next module, cache).

        `previous` is the hidden state at `positions`, from the model or the module before; `tokens` are k places
        further on.
        """
        context = self.context(positions, segment_ids).replace(implementation=self.attention)
        embedded = self.apply(outside, tokens, positions, method="embed")
        given = self.prediction_module(parent=None).apply(module, previous, embedded, context, cache)
        hidden, previous, cache, _ = given
        return hidden, previous, cache


def modules_ahead(config: Any) -> int:
    """The number of modules of multi-token prediction in a model of this config, which may be of any architecture."""
    return getattr(config, "num_nextn_predict_layers", 0)


def has_token_ahead(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, distance: int
) -> Bool[Array, "B T"]:
    """Whether the token `distance` places further on is in the row, and of the same document."""
    length = tokens.shape[1]
    inside = jnp.broadcast_to(jnp.arange(length) < length - distance, tokens.shape)
    if segment_ids is None:
        return inside
    return inside & (segment_ids != 0) & (jnp.roll(segment_ids, -distance, axis=1) == segment_ids)


class DeepSeekBlock(Llama3Block):
    """Llama's block with multi-head latent attention."""

    config: DeepSeekV3Config  # type: ignore[assignment]

    @nn.nowrap
    def attention_layer(self) -> nn.Module:
        return latent_attention(self.config, self.dtype, name="attention")

    @nn.nowrap
    def create_cache(self, batch: int, length: int, dtype: Dtype, lookahead: int = 0) -> LatentCache:
        return LatentCache.create(batch, length, self.config.latent_sizes.cached_width, dtype)


def latent_attention(config: DeepSeekV3Config, dtype: Dtype | None = None, name: str | None = None) -> LatentAttention:
    """The layer of multi-head latent attention that the config describes."""
    return LatentAttention(
        config.latent_sizes,
        scale=config.score_scale,
        interleaved=config.rope_interleave,
        use_bias=config.attention_bias,
        up_bias=config.attention_up_bias,
        epsilon=LATENT_EPSILON,
        kernel_init=nn.initializers.normal(config.initializer_range),
        dropout_rate=config.attention_dropout,
        dtype=dtype,
        name=name,
    )


class PredictionModule(DeepSeekBlock):
    """A block on the projection of two normalised vectors, the hidden state at i and the embedding of token i + k. At
    depth k, with the variable or the module here:

        h' = M [norm(h of depth k - 1); norm(Emb(t_(i + k)))]    eq. 21    `previous`, `embedded`; projection: M
        h of depth k = TRM(h')                                   eq. 22    the block

    DeepSeek's checkpoints have the embedding first; the paper writes it second.
    """

    @nn.compact
    def __call__(  # type: ignore[override]  # It takes two inputs.
        self,
        previous: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        context: Context,
        cache: Cache | None = None,
    ) -> tuple[Array, Array, Cache | None, dict[str, Any]]:
        """(hidden state to unembed, `previous` of the next module, cache, counts)."""
        c = self.config
        norm = partial(norm_layer, c.norm, c.rms_norm_eps, c.hidden_size, c.initializer_range)
        normal = nn.initializers.normal(c.initializer_range)
        both = jnp.concatenate([norm("embedding_norm")(embedded), norm("hidden_norm")(previous)], axis=-1)
        x = Linear(c.hidden_size, False, normal, self.dtype, name="projection")(both)
        x, cache, counts = super().__call__(x, context, cache)
        hidden = norm("final_norm")(x)
        return hidden, hidden if c.mtp_hidden == "after_norm" else x, cache, counts


class PredictionStep(nn.Module):
    """One module of multi-token prediction, as the body of a loop over them."""

    module: Any

    @nn.compact
    def __call__(self, previous: Array, ahead: tuple[Any, ...], context: Context) -> tuple[Array, tuple[Any, ...]]:
        embedded, segment_ids, caches = ahead
        context = context.replace(segment_ids=segment_ids)  # a place without a token ahead counts as padding
        hidden, previous, cache, counts = self.module(name=BLOCK)(previous, embedded, context, caches)
        return previous, (hidden, cache, {BLOCK: counts})


PRESETS = {
    "deepseek-v3": DeepSeekV3Config(
        max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    # Of DeepSeek-V2-Lite's size: 16 billion parameters, 3 of which are active.
    "moonlight-16b": DeepSeekV3Config(
        vocab_size=163840,
        max_position_embeddings=8192,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        intermediate_size=11264,
        first_k_dense_replace=1,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 50000.0},
    ),
    # To train from bytes, on a laptop.
    "deepseek-10m": DeepSeekV3Config(
        vocab_size=257,
        max_position_embeddings=256,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=768,
        first_k_dense_replace=1,
        n_routed_experts=16,
        num_experts_per_tok=3,
        moe_intermediate_size=192,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
    ),
}
