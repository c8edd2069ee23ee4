"""Ministral (Mistral AI 2024): Mistral, in which `layer_types` says which layers have the window.

Where a Mistral's window is in every layer, here some layers see everything, as in Qwen 2.

Reference: transformers' `MinistralForCausalLM`. Deviations: none by default.
"""

from dataclasses import dataclass
from typing import ClassVar

from llmq_jax.models.mistral import MistralConfig
from llmq_jax.models.qwen import Qwen2Config


@dataclass(frozen=True)
class MinistralConfig(Qwen2Config):
    """Kinds of layers as in Qwen 2; all else, the defaults too, as in Mistral."""

    model_type: ClassVar[str] = "ministral"

    vocab_size: int = MistralConfig.vocab_size
    max_position_embeddings: int = MistralConfig.max_position_embeddings
    num_key_value_heads: int | None = MistralConfig.num_key_value_heads
    intermediate_size: int = MistralConfig.intermediate_size
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    sliding_window: int | None = MistralConfig.sliding_window
    """Keys that a token sees in a local layer, its own among them; None: there are no local layers."""
