"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): Llama, whose layers may have a window.

It has Llama's grouped-query attention, RoPE, RMSNorm and SwiGLU. In v0.1 every layer has a window: a token sees 4,096
keys, and through L layers as far back as L windows (section 2). Later versions see everything.

Reference: transformers' `MistralForCausalLM`. Deviations: none by default.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llmq_jax.models.config import require_at_least
from llmq_jax.models.llama3 import Llama3Config


@dataclass(frozen=True)
class MistralConfig(Llama3Config):
    """What differs from Llama; the defaults are transformers'."""

    model_type: ClassVar[str] = "mistral"

    max_position_embeddings: int = 131072
    num_key_value_heads: int | None = 8
    intermediate_size: int = 14336
    sliding_window: int | None = 4096
    """Keys that a token sees, its own among them; None is all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_window is not None:
            require_at_least(1, self, "sliding_window")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers


MISTRAL_7B: dict[str, Any] = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
PRESETS = {
    "mistral-7b-v0.1": MistralConfig(**MISTRAL_7B),
    "mistral-7b-v0.3": MistralConfig(
        **MISTRAL_7B, vocab_size=32768, rope_parameters={"rope_theta": 1_000_000.0}, sliding_window=None
    ),
}
