"""Convert a Hugging Face model, or a file of weights, into a checkpoint of this project."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from convert.to_hf import command_for
from llmq_jax.command_line import run
from llmq_jax.options import Flag, Positional, default_is


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """The model: a Hugging Face folder, a hub id, or a file of weights (.safetensors, .bin, .pth)."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    overwrite: Flag = False
    """Replace the target if an earlier conversion wrote it."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the file")] = None
    """Type to store the weights in."""
    layout: str = "hf"
    """Whose names the weights have: hf (transformers), original; for GPT-2 also book (LLMs-from-scratch), nanogpt."""
    num_attention_heads: Annotated[int | None, default_is("that of config.json")] = None
    """Number of heads, for weights without a config.json: their shapes tell most of the rest."""
    config: Annotated[tuple[str, ...], default_is("what shapes tell", metavar="FIELD=VALUE ...")] = ()
    """Other fields of the config, for weights without a config.json: num_experts_per_tok=2 rms_norm_eps=1e-5. What
    their shapes do not tell is asked for."""
    tokenizer: Annotated[str | None, default_is("the model's")] = None
    """Tokenizer for a model that comes without: bytes, gpt2, a tokenizer.json, a folder, run or GGUF file with
    one, or org/name of a model on the hub."""


def main(options: Options) -> None:
    from llmq_jax.data.tokenizer_loading import load_tokenizer
    from llmq_jax.errors import BadInput
    from llmq_jax.model_files import free_folder, load, save

    free_folder(options.target, options.overwrite)  # a model is read for minutes
    config = fields_given(options)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
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
    folder = save(lm, options.target, overwrite=options.overwrite)
    print(f"{folder}: {lm}")
    if lm.tokenizer is None:
        print("without a tokenizer, which text needs: give one with --tokenizer")
    else:
        print(f"next: {command_for(lm, str(folder))}")


def fields_given(options: Options) -> dict[str, Any] | None:
    """The fields of the config that the options give; None where they give none."""
    from llmq_jax.errors import BadInput
    from llmq_jax.interop.huggingface import find
    from llmq_jax.model_files import fields_of_weights, has_config

    heads = options.num_attention_heads
    words = {"--num-attention-heads": () if heads is None else (f"num_attention_heads={heads}",)}
    words |= {"--config": options.config}
    if not any(words.values()):
        return None
    source = find(options.source)
    if has_config(source):
        given = " and ".join(option for option, fields in words.items() if fields)
        raise BadInput(f"{options.source}: has a config of its own; drop {given}")
    return fields_of_weights(source, options.layout, [word for fields in words.values() for word in fields])


if __name__ == "__main__":
    run(main)
