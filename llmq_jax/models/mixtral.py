"""Mixtral (Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088): the classic sparse mixture of experts.

Mistral (grouped-query attention, RoPE, RMSNorm, SwiGLU) in which every feed-forward network is 8 experts, of which each
token passes through 2:
- the router is a linear layer; softmax over all experts, the two largest renormalised to add up to 1 (section 2.1)
- no token is dropped, no shared expert
- in training, a load-balancing loss over the tokens of all layers together (transformers' `router_aux_loss_coef`)
- no window, unless a config has one, as early ones do

Reference: transformers' `MixtralForCausalLM`. Deviations: none; its jitter on the router's input
(`router_jitter_noise`) is not here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llmq_jax.field_types import check_fields
from llmq_jax.layers.expert_balance import Balance
from llmq_jax.layers.moe import Experts, experts_from, require_same_sizes
from llmq_jax.layers.positions import Rope
from llmq_jax.models.config import require, require_at_least
from llmq_jax.models.llama3 import Llama3
from llmq_jax.models.mistral import MistralConfig

MIXTRAL_ROPE = Rope(rope_theta=1_000_000.0)


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """What differs from Mistral; the defaults are transformers'. The fields describe the experts."""

    model_type: ClassVar[str] = "mixtral"

    intermediate_size: int = 14336
    """Width of an expert."""
    rms_norm_eps: float = 1e-5
    rope_parameters: Rope | dict[str, Any] = MIXTRAL_ROPE
    sliding_window: int | None = None
    """Keys that a token sees, its own among them; None is all."""
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    """Coefficient of the load-balancing loss, which training adds. `experts` may have another `balance`: a dict changes
    some of what these fields say, `Experts` replace all of it."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.router_aux_loss_coef >= 0, self, "router_aux_loss_coef", "must be at least 0")
        require_at_least(1, self, "num_local_experts", "num_experts_per_tok")
        rule = f"is more than num_local_experts={self.num_local_experts}"
        require(self.num_experts_per_tok <= self.num_local_experts, self, "num_experts_per_tok", rule)
        given = experts_from(self.experts, self.num_hidden_layers, self.usual_experts)
        object.__setattr__(self, "experts", given)
        super().__post_init__()
        sizes = (self.num_local_experts, self.num_experts_per_tok)
        require_same_sizes(given, sizes, self, "num_local_experts and num_experts_per_tok")

    @property
    def usual_experts(self) -> Experts:
        """The experts where `experts` is None: those of transformers' Mixtral."""
        return Experts(self.num_local_experts, self.num_experts_per_tok, balance=self.pooled_balance)

    @property
    def pooled_balance(self) -> Balance | None:
        """transformers' auxiliary loss."""
        coefficient = self.router_aux_loss_coef
        return Balance(load_balance=coefficient, pooled=True, divide_by_top_k=False) if coefficient else None


class Mixtral(Llama3):
    """Llama with experts."""

    config: MixtralConfig


PRESETS = {
    "mixtral-8x7b": MixtralConfig(max_position_embeddings=32768, router_aux_loss_coef=0.02),
    # To train from bytes, on a laptop.
    "mixtral-10m": MixtralConfig(
        vocab_size=257,
        max_position_embeddings=256,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        router_aux_loss_coef=0.01,
    ),
}
