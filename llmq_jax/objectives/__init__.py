"""One training objective a file."""

from llmq_jax.objectives.classification import Classification
from llmq_jax.objectives.cross_entropy import chunked_cross_entropy, token_losses
from llmq_jax.objectives.multi_token import MultiToken
from llmq_jax.objectives.next_token import NextToken

__all__ = ["Classification", "MultiToken", "NextToken", "chunked_cross_entropy", "token_losses"]
