"""Export a model as a Hugging Face folder, for transformers' `from_pretrained`, or its adapters for PEFT."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from convert.adapter_base import found_base, given_base, run_options
from llmq_jax.command_line import run
from llmq_jax.defaults import MAX_SHARD_SIZE
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, Positional, default_is, option_name


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, OpenAI's GPT-2, or a hub id."""
    target: Positional[str]
    """The folder to write; it must not exist or be empty."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the model")] = None
    """Type to write the weights in."""
    max_shard_size: Annotated[str | None, default_is(MAX_SHARD_SIZE)] = None
    """Split larger weights into files of at most this size."""
    overwrite: Flag = False
    """Replace the target if it is an earlier export."""
    adapter: Flag = False
    """Write the model's adapters alone, as a folder for PEFT; without this they are merged into the weights."""
    base: Annotated[str | None, default_is("what the run began with")] = None
    """With --adapter: the path or hub id, for PEFT to remember, of the model that the adapters belong to."""


def main(options: Options) -> None:
    from llmq_jax.interop import huggingface, peft_writer
    from llmq_jax.interop.safetensors_files import check_shard_size
    from llmq_jax.layers.lora import without_adapters
    from llmq_jax.model_files import load
    from llmq_jax.whole_folders import check_target

    if options.base is not None and not options.adapter:
        raise BadInput("--base has no effect without --adapter; leave it out")
    target = Path(options.target).expanduser().resolve()
    written = peft_writer if options.adapter else huggingface
    check_target(target, options.overwrite, written.CONFIG, written.EXPORTED)  # a model is read for minutes
    size = MAX_SHARD_SIZE if options.max_shard_size is None else options.max_shard_size
    check_shard_size(size)
    lm = load(options.source)
    refuse_mean_pooling(Path(options.source))
    if options.adapter:
        write_adapter(lm, options)
        return
    widened = wide_enough(lm, options.dtype)
    folder = huggingface.save_hf(widened, options.target, options.dtype, size, options.overwrite)
    merged = lm.replace(variables=without_adapters(lm.variables))  # whose line tells of no adapters
    print(f"{folder}: {merged}\n{type_written(lm, options.dtype)}")
    if lm.tokenizer is None:
        print(
            f"without a tokenizer, which text needs: {options.source} holds none (tokenizer.json; OpenAI's "
            "encoder.json and vocab.bpe)"
        )
    else:
        print(f"next: {command_for(lm, str(folder))}")
    kind = "CausalLM" if lm.config.labels is None else "SequenceClassification"
    print(f'next: transformers.AutoModelFor{kind}.from_pretrained("{folder}")')


def refuse_mean_pooling(source: Path) -> None:
    """BadInput for a reward model that transformers would score by the last token, and the run did not."""
    if source.exists() and run_options(source).get("pooling") == "mean":
        raise BadInput(
            f"{source}: was trained with --pooling mean, which transformers does not compute; use it as it is, in "
            "train.grpo with --reward-pooling mean"
        )


def wide_enough(lm: Any, dtype: str | None) -> Any:
    """The model, with weights in float32 if adapters are to be merged and written in another type than its own: so
    that merging does not round to the model's type."""
    import jax
    import jax.numpy as jnp

    from llmq_jax.layers.lora import LORA
    from llmq_jax.weight_type import weight_type

    if LORA not in lm.variables or dtype in (None, weight_type(lm.params).name):
        return lm
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), lm.params)
    return lm.replace(variables={**lm.variables, "params": params})


def type_written(lm: Any, dtype: str | None) -> str:
    """One line on the type of the written weights and, where none was asked for, on what another type would give."""
    from llmq_jax.layers.lora import LORA
    from llmq_jax.weight_type import weight_type

    own = weight_type(lm.params).name
    if dtype is None and own == "float32":
        return "written in float32, that of the model; --dtype bfloat16 halves it"
    if dtype is None and LORA in lm.variables:
        return f"written in {own}, to which adapters were rounded as they were merged; --dtype float32 keeps them whole"
    return f"written in {dtype or own}"


def write_adapter(lm: Any, options: Options) -> None:
    from llmq_jax.adapters import save_adapter
    from llmq_jax.interop.peft_writer import taken_for_experts

    for name in ("dtype", "max_shard_size"):
        if getattr(options, name) is not None:
            raise BadInput(f"{option_name(name)} has no effect with --adapter, one file in float32; leave it out")
    base = found_base(options.source) if options.base is None else given_base(options.base)
    folder = save_adapter(lm, options.target, base=base.name, overwrite=options.overwrite)
    print(f"{folder}: the adapters of {lm}\n{base.said}")
    if base.name:
        print(f"next: {command_for(lm, str(folder))}")
    labels = lm.config.labels
    kind, sizes = ("CausalLM", "") if labels is None else ("SequenceClassification", f", num_labels={len(labels)}")
    with_base = f', or peft.AutoPeftModelFor{kind}.from_pretrained("{folder}"{sizes})' if base.for_peft else ""
    if taken_for_experts(lm.variables, lm.config) is None:
        print(f'next: peft.PeftModel.from_pretrained(base, "{folder}"){with_base}')


def command_for(lm: Any, folder: str) -> str:
    """A command that gives the model something to answer."""
    folder = shlex.quote(folder)
    if lm.config.labels is not None:
        return f'llmq classify {folder} --text "Is it so?"'
    if lm.tokenizer is not None and lm.tokenizer.chat_template is not None:
        return f"llmq chat {folder}"
    return f'llmq generate {folder} --prompt "Once upon a time"'


if __name__ == "__main__":
    run(main)
