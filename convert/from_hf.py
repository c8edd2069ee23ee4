"""Convert a Hugging Face model, or a file of weights, into a checkpoint of this project."""

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

from llmq_jax.command_line import Positional, default_is, run


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """The model: a Hugging Face folder, a hub id, or a file of weights (.safetensors, .bin, .pth)."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the file")] = None
    """Type to store the weights in."""
    layout: str = "hf"
    """Whose names the weights bear: hf (transformers), original; for GPT-2 also book (LLMs-from-scratch), nanogpt."""
    num_attention_heads: Annotated[int | None, default_is("that of config.json")] = None
    """Number of heads, for weights without a config.json: their shapes tell the rest of the config."""
    tokenizer: Annotated[str | None, default_is("the model's")] = None
    """Tokenizer for a model that comes without: bytes, gpt2, or a tokenizer.json or a folder with one."""


def main(options: Options) -> None:
    from llmq_jax.data.tokenizers import load_tokenizer
    from llmq_jax.errors import BadInput
    from llmq_jax.interop.huggingface import find
    from llmq_jax.model_files import has_config, load, save

    if options.num_attention_heads is not None and has_config(find(options.source)):
        raise BadInput(f"{options.source}: has a config of its own; drop --num-attention-heads")
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    heads = options.num_attention_heads
    config = None if heads is None else {"num_attention_heads": heads}
    lm = load(options.source, options.layout, config, options.dtype)
    if tokenizer is not None:
        if lm.tokenizer is not None:
            raise BadInput(f"{options.source}: has a tokenizer of its own; drop --tokenizer")
        if tokenizer.vocab_size > lm.config.vocab_size:
            raise BadInput(
                f"the tokenizer {options.tokenizer} has {tokenizer.vocab_size} ids, more than the model's vocabulary "
                f"of {lm.config.vocab_size}; name the one that the model was trained with"
            )
        ends = lm.generation.eos_token_id or tuple(i for i in [tokenizer.end_of_text] if i is not None)
        lm = lm.replace(tokenizer=tokenizer, generation=lm.generation.replace(eos_token_id=ends))
    folder = save(lm, options.target)
    print(f"{folder}: {lm}")
    if lm.tokenizer is None:
        print("without a tokenizer, which text needs: give one with --tokenizer")
    else:
        print(f'next: llmq generate {shlex.quote(str(folder))} --prompt "Once upon a time"')


if __name__ == "__main__":
    run(main)
