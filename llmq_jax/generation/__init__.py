"""From prompts to text: sampling, and the decoding loop."""

from llmq_jax.generation.generate import generate, stream
from llmq_jax.generation.prompt_cache import PromptCache
from llmq_jax.generation.request import Generation
from llmq_jax.generation.sampling import Sampler, row_seed

__all__ = ["Generation", "PromptCache", "Sampler", "generate", "row_seed", "stream"]


def __dir__() -> list[str]:
    return __all__
