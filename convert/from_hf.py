"""Convert a Hugging Face model into a checkpoint of this project."""

from dataclasses import dataclass
from typing import Literal

from llmq_jax.command_line import Positional, run


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """The model: a Hugging Face folder, a .safetensors file beside its config.json, or a hub id."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type to store the weights in (default: that of the file)."""


def main(options: Options) -> None:
    from llmq_jax.language_model import load, save

    lm = load(options.source, dtype=options.dtype)
    folder = save(lm, options.target)
    print(f"{folder}: {lm}")
    print(f'next: llmq generate {folder} --prompt "Once upon a time"')


if __name__ == "__main__":
    run(main)
