"""From prompts to text: sampling, and the decoding loop."""

from llmq_jax.generation.generate import Generation, generate, stream
from llmq_jax.generation.sampling import Sampler

__all__ = ["Generation", "Sampler", "generate", "stream"]
