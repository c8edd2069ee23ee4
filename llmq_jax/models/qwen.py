"""Qwen 2.5 (Qwen Team 2024, arXiv:2412.15115; Qwen 2, arXiv:2407.10671, is the same) and Qwen 3 (Qwen Team 2025,
arXiv:2505.09388), dense and with experts.

Llama (grouped-query attention, RoPE, RMSNorm, SwiGLU) with one change each:
- Qwen 2: queries, keys and values have biases, and nothing else does
- Qwen 3: no biases; queries and keys are normalised, by head and before RoPE (`normalises_queries`), and a head is 128
  features wide, whatever hidden_size is
- Qwen 3 with experts (30B-A3B, Coder): 128 narrow experts in the place of each feed-forward network; a token passes
  through 8 of them. As in Mixtral, no token is dropped, no expert is shared, and the balance loss is over all layers
  together. `mlp_only_layers` and `decoder_sparse_step` may leave layers dense; the published models have no dense
  layers

Long contexts use YaRN (`rope_parameters`). The layers that `layer_types` calls sliding_attention see a window of
`sliding_window` keys; the published models have none.

Reference: transformers' `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `Qwen3MoeForCausalLM`. Deviations: none by default.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llmq_jax.field_types import check_fields
from llmq_jax.layers.moe import Experts
from llmq_jax.layers.positions import Rope
from llmq_jax.models.config import GLOBAL, LOCAL, KindsOfLayers, require, require_at_least, set_layer_types
from llmq_jax.models.llama3 import DEFAULT_ROPE, Llama3Config
from llmq_jax.models.mixtral import MixtralConfig


@dataclass(frozen=True)
class Qwen2Config(KindsOfLayers, Llama3Config):
    """What differs from Llama; the defaults are transformers'."""

    model_type: ClassVar[str] = "qwen2"

    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    num_key_value_heads: int | None = 32
    intermediate_size: int = 22016
    attention_bias: bool = True
    attention_output_bias: bool | None = False
    sliding_window: int | None = None
    """Keys that a token sees in a local layer, its own among them; None: there are no local layers."""
    layer_types: tuple[str, ...] | list[str] | None = None
    """"sliding_attention" (local) or "full_attention" (global) for each layer; None: all are local if there is a
    `sliding_window`, else all are global."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_window is not None:
            require_at_least(1, self, "sliding_window")
        set_layer_types(self)
        require(
            self.sliding_window is None or LOCAL in self.layer_kinds,
            self,
            "sliding_window",
            f"has no effect, since layer_types has no {LOCAL}",
        )
        require(
            self.sliding_window is not None or LOCAL not in self.layer_kinds,
            self,
            "layer_types",
            f"has {LOCAL}, and sliding_window is None",
        )

    @property
    def usual_layer_types(self) -> tuple[str, ...]:
        """The kind of each layer where `layer_types` is None."""
        return (GLOBAL if self.sliding_window is None else LOCAL,) * self.num_hidden_layers


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """What differs from Qwen 2."""

    model_type: ClassVar[str] = "qwen3"
    normalises_queries: ClassVar[bool] = True

    head_dim: int | None = 128
    attention_bias: bool = False
    attention_output_bias: bool | None = None


@dataclass(frozen=True)
class Qwen3MoeConfig(MixtralConfig):
    """What differs from Mixtral. A window applies to all layers, and by default heads are hidden_size /
    num_attention_heads wide."""

    model_type: ClassVar[str] = "qwen3_moe"
    normalises_queries: ClassVar[bool] = True

    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_key_value_heads: int | None = 4
    intermediate_size: int = 6144
    """Width of the feed-forward network of dense layers."""
    rms_norm_eps: float = 1e-6
    rope_parameters: Rope | dict[str, Any] = DEFAULT_ROPE
    num_local_experts: int = 128
    """Files of the hub call it num_experts."""
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    """Width of an expert."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts are made to add up to 1. The published models have it on."""
    decoder_sparse_step: int = 1
    """Layers whose number, counted from 1, this divides have experts; 1: all layers."""
    mlp_only_layers: tuple[int, ...] | list[int] = ()
    """Further layers without experts, counted from 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least(1, self, "num_hidden_layers", "moe_intermediate_size", "decoder_sparse_step")
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        layers, rule = self.num_hidden_layers, f"must be numbers of the {self.num_hidden_layers} layers, counted from 0"
        require(all(0 <= layer < layers for layer in self.mlp_only_layers), self, "mlp_only_layers", rule)
        rule = f"and mlp_only_layers={list(self.mlp_only_layers)} leave no layer with experts; that is a Qwen3Config"
        require(len(self.dense_layers) < layers, self, "decoder_sparse_step", rule)
        super().__post_init__()

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers without experts."""
        step, others = self.decoder_sparse_step, set(self.mlp_only_layers)
        return tuple(layer for layer in range(self.num_hidden_layers) if (layer + 1) % step or layer in others)

    @property
    def usual_experts(self) -> Experts:
        """The experts where `experts` is None: those of transformers' Qwen 3."""
        return Experts(
            self.num_local_experts,
            self.num_experts_per_tok,
            self.moe_intermediate_size,
            dense_layers=self.dense_layers,
            renormalise=self.norm_topk_prob,
            balance=self.pooled_balance,
        )


QWEN_2_5: dict[str, Any] = {"rope_parameters": {"rope_theta": 1_000_000.0}}
QWEN_3: dict[str, Any] = {**QWEN_2_5, "max_position_embeddings": 40960, "num_key_value_heads": 8}
PRESETS = {
    "qwen2.5-0.5b": Qwen2Config(
        **QWEN_2_5,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        **QWEN_2_5,
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        **QWEN_2_5,
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
    ),
    "qwen3-0.6b": Qwen3Config(
        **QWEN_3,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=3072,
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": Qwen3Config(
        **QWEN_3,
        hidden_size=2048,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=6144,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": Qwen3Config(
        **QWEN_3,
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        intermediate_size=9728,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": Qwen3Config(
        **QWEN_3,
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        intermediate_size=12288,
    ),
    "qwen3-30b-a3b": Qwen3MoeConfig(
        **QWEN_3 | {"num_key_value_heads": 4}, num_hidden_layers=48, head_dim=128, norm_topk_prob=True
    ),
    # To train from bytes, on a laptop.
    "qwen3-moe-10m": Qwen3MoeConfig(
        vocab_size=257,
        max_position_embeddings=256,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        num_local_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
    ),
}
