"""Export a model as a Hugging Face folder, for transformers' `from_pretrained`, or its adapters for PEFT."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmq_jax.command_line import Flag, Positional, default_is, option_name, run
from llmq_jax.errors import BadInput


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, or a hub id."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the model")] = None
    """Type to write the weights in."""
    max_shard_size: Annotated[str | None, default_is("5GB")] = None
    """Split larger weights into files of at most this size."""
    overwrite: Flag = False
    """Replace the target where it is an earlier export."""
    adapter: Flag = False
    """Write the model's adapters alone, as a folder for PEFT; without this they are merged into the weights."""
    base: Annotated[str | None, default_is("none")] = None
    """With --adapter: the path or hub id, for PEFT to remember, of the model that the adapters belong to."""


def main(options: Options) -> None:
    from llmq_jax.interop.huggingface import save_hf
    from llmq_jax.language_model import load

    if options.base is not None and not options.adapter:
        raise BadInput("--base has no effect without --adapter; leave it out")
    lm = load(options.source)
    if options.adapter:
        write_adapter(lm, options)
        return
    folder = save_hf(lm, options.target, options.dtype, options.max_shard_size or "5GB", options.overwrite)
    print(f"{folder}: {lm}")
    kind = "CausalLM" if lm.config.labels is None else "SequenceClassification"
    print(f'next: transformers.AutoModelFor{kind}.from_pretrained("{folder}")')


def write_adapter(lm: Any, options: Options) -> None:
    from llmq_jax.adapters import save_adapter

    for name in ("dtype", "max_shard_size"):
        if getattr(options, name) is not None:
            raise BadInput(f"{option_name(name)} has no effect with --adapter, one file in float32; leave it out")
    folder = save_adapter(lm, options.target, base=options.base or "", overwrite=options.overwrite)
    print(f"{folder}: the adapters of {lm}")
    print(f'next: peft.PeftModel.from_pretrained(base, "{folder}")')


if __name__ == "__main__":
    run(main)
