"""Convert OpenAI's release of GPT-2, a TensorFlow checkpoint, into a Hugging Face folder; TensorFlow is not needed.

It is `python -m convert.to_hf`, which takes any model, for OpenAI's folders alone.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from convert import to_hf
from llmq_jax.command_line import run
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, Positional, default_is


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """OpenAI's folder: model.ckpt.index, model.ckpt.data-*, hparams.json, encoder.json and vocab.bpe."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the checkpoint")] = None
    """Type to write the weights in."""
    overwrite: Flag = False
    """Replace the target if it is an earlier export."""


def main(options: Options) -> None:
    from llmq_jax.interop.openai import is_openai

    if not is_openai(Path(options.source).expanduser()):
        raise BadInput(
            f"{options.source}: is no folder of OpenAI's, which holds hparams.json and model.ckpt.index; python -m "
            "convert.to_hf takes other models"
        )
    to_hf.main(to_hf.Options(**asdict(options)))


if __name__ == "__main__":
    run(main)
