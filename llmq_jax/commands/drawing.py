"""The options that `generate` and `chat` share: which model, how it draws its tokens, where it computes."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmq_jax.command_line import Positional, Repeated, default_is, use_device
from llmq_jax.errors import BadInput

SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    model: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, a hub id, or a GGUF file."""
    max_new_tokens: int | None = None
    """Stop after this many tokens, if nothing stops it before."""
    temperature: float = 0.8
    """Below 1 favours what is likely, above 1 what is not; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw from this many likeliest tokens only; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to this; 1 draws from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this times the likeliest; 0 leaves out none."""
    stop: Repeated = ()
    """Stop before this text appears; may be given several times."""
    seed: Annotated[int | None, default_is("0")] = None
    """The same seed draws the same text."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the file")] = None
    """Type to compute in and to hold the weights in."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""

    def load(self) -> tuple[Any, dict[str, Any]]:
        """(the model, what `lq.generate` and `lq.stream` take beside prompt, length and seed)."""
        if self.seed is not None and self.temperature == 0:
            raise BadInput("--seed has no effect at temperature 0, where nothing is drawn; leave it out")
        if not 0 <= (self.seed or 0) < SEEDS:
            raise BadInput(f"--seed {self.seed} must lie between 0 and {SEEDS - 1}")
        use_device(self.device)
        import llmq_jax as lq

        sampler = lq.Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        lm = lq.load(self.model, dtype=self.dtype)
        lm.require_tokenizer(self.model)
        return lm, {"sampler": sampler, "stop": list(self.stop) or None}

    def seed_of(self, number: int) -> int:
        """The seed of one of several texts, numbered from 0."""
        return ((self.seed or 0) + number) % SEEDS
