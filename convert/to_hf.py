"""Export a model as a Hugging Face folder, which transformers loads with `from_pretrained`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llmq_jax.command_line import Flag, Positional, default_is, run


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, or a hub id."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the model")] = None
    """Type to write the weights in."""
    max_shard_size: str = "5GB"
    """Split larger weights into files of at most this size."""
    overwrite: Flag = False
    """Replace the target where it is an earlier export."""


def main(options: Options) -> None:
    from llmq_jax.interop.huggingface import save_hf
    from llmq_jax.language_model import load

    lm = load(options.source)
    folder = save_hf(lm, options.target, options.dtype, options.max_shard_size, options.overwrite)
    print(f"{folder}: {lm}")
    print(f'next: transformers.AutoModelForCausalLM.from_pretrained("{folder}")')


if __name__ == "__main__":
    run(main)
