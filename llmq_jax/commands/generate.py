"""Continue a prompt with any model: a run of this project, a Hugging Face folder or hub id."""

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

from llmq_jax.command_line import Positional, Repeated, default_is, use_device
from llmq_jax.errors import BadInput

NEW_TOKENS = 128


@dataclass(frozen=True)
class Options:
    model: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, or a hub id."""
    prompt: str
    """The text to go on from; - reads it from standard input."""
    max_new_tokens: Annotated[int | None, default_is(f"{NEW_TOKENS}, or what the model's context has room for")] = None
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


def main(options: Options) -> None:
    if options.seed is not None and options.temperature == 0:
        raise BadInput("--seed has no effect at temperature 0, where nothing is drawn; leave it out")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    use_device(options.device)

    import llmq_jax as lq

    sampler = lq.Sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p)
    lm = lq.load(options.model, dtype=options.dtype)
    tokenizer = lm.require_tokenizer(options.model)
    # An empty prompt starts from the end-of-text token.
    room = lm.config.max_position_embeddings - max(1, len(tokenizer.encode(prompt)))
    new_tokens = max(1, min(NEW_TOKENS, room)) if options.max_new_tokens is None else options.max_new_tokens
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    for piece in lq.stream(
        lm,
        prompt,
        max_new_tokens=new_tokens,
        sampler=sampler,
        stop=list(options.stop) or None,
        seed=options.seed or 0,
    ):
        print(piece, end="", flush=True)
    print(flush=True)
    if sys.stderr.isatty():
        print(f"{time.perf_counter() - start:.1f} s, compilation included", file=sys.stderr)
