"""Convert OpenAI's release of GPT-2, a TensorFlow checkpoint, into a Hugging Face folder; TensorFlow is not needed."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llmq_jax.command_line import Flag, Positional, default_is, run


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """OpenAI's folder: model.ckpt.index, model.ckpt.data-*, hparams.json, encoder.json and vocab.bpe."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the checkpoint")] = None
    """Type to write the weights in."""
    overwrite: Flag = False
    """Replace the target where it is an earlier export."""


def main(options: Options) -> None:
    from llmq_jax.errors import BadInput
    from llmq_jax.interop.huggingface import save_hf
    from llmq_jax.interop.openai import is_openai
    from llmq_jax.model_files import load

    source = Path(options.source).expanduser()
    if not is_openai(source):
        raise BadInput(f"{options.source}: is no folder of OpenAI's, which holds hparams.json and model.ckpt.index")
    lm = load(source, layout="openai")
    folder = save_hf(lm, options.target, options.dtype, overwrite=options.overwrite)
    print(f"{folder}: {lm}")
    if lm.tokenizer is None:
        print(f"without a tokenizer, which text needs: {source} does not hold both encoder.json and vocab.bpe")
    else:
        print(f'next: llmq generate {shlex.quote(str(folder))} --prompt "Once upon a time"')


if __name__ == "__main__":
    run(main)
