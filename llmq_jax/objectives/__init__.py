"""One training objective a file."""

from llmq_jax.objectives.advantages import group_advantages, process_advantages
from llmq_jax.objectives.balance_losses import with_balance_losses
from llmq_jax.objectives.classification import Classification
from llmq_jax.objectives.cross_entropy import chunked_cross_entropy, token_losses
from llmq_jax.objectives.grpo import GRPO, grpo_loss
from llmq_jax.objectives.logprobs import sequence_logprobs, token_logprobs
from llmq_jax.objectives.means import safe_divide
from llmq_jax.objectives.multi_token import MultiToken
from llmq_jax.objectives.next_token import NextToken
from llmq_jax.objectives.preference import DPO, dpo_loss, pair_logprobs
from llmq_jax.objectives.reward import RewardModel, bradley_terry_loss, model_rewards, sequence_rewards, token_scores

__all__ = [
    "DPO",
    "GRPO",
    "Classification",
    "MultiToken",
    "NextToken",
    "RewardModel",
    "bradley_terry_loss",
    "chunked_cross_entropy",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "model_rewards",
    "pair_logprobs",
    "process_advantages",
    "safe_divide",
    "sequence_logprobs",
    "sequence_rewards",
    "token_logprobs",
    "token_losses",
    "token_scores",
    "with_balance_losses",
]


def __dir__() -> list[str]:
    return __all__
