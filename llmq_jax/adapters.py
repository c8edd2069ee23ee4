"""Adapters of a language model: made, merged, read from and written to PEFT's folders.

    learner = lq.lora(lm, rank=16, targets="attention")      fresh ones, which change nothing yet
    lq.save_adapter(learner, "folder")                       PEFT loads it onto the base
    other = lq.load_adapter(lm, "folder")                    several adapters, one base: its arrays are shared
    lq.save_hf(lq.merge(other), "model")                     a model like any other

Models are immutable: each of these functions leaves the one it is given as it was.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from llmq_jax.data.tokenizer_loading import tokenizer_in
from llmq_jax.errors import BadInput, warn
from llmq_jax.field_types import require_model
from llmq_jax.interop.generation_config import GenerationConfig, read_generation_config
from llmq_jax.interop.huggingface import CONFIG, find, is_hf
from llmq_jax.interop.peft import is_adapter, module_names
from llmq_jax.interop.peft_reader import base_of, read_adapter
from llmq_jax.interop.peft_writer import write_adapter
from llmq_jax.language_model import LanguageModel, with_classifier
from llmq_jax.layers import lora as low_rank
from llmq_jax.layers.fresh_adapters import add_adapters
from llmq_jax.layers.lora import LoRA
from llmq_jax.model_files import TextFiles, agreed, decided, load, load_weights
from llmq_jax.models.heads import numbered_labels
from llmq_jax.option_names import meant_by


def lora(lm: LanguageModel, spec: LoRA | None = None, *, seed: int = 0, **fields: Any) -> LanguageModel:
    """The model with fresh adapters in float32. `fields` are those of `LoRA`: rank, alpha, targets, layers, variant,
    use_rslora, dropout, whole, ...

    `targets` names matrices by our names (query, mlp/up) or by transformers' (q_proj, mlp.up_proj), with the wildcards
    of shells. A matrix W [D, F] gets A [D, R], drawn by the seed, and B [R, F], zeros, and becomes W + alpha/R A B (Hu
    et al. 2021, arXiv:2106.09685, eq. 3); variants differ. What `whole` names, by our names or transformers', trains as
    it is: embedding or head, which in a model that has one matrix for both are "token_embedding".

    BadInput: the model has adapters already, a target or layer that it lacks, a rank above a matrix's, fields that
    contradict each other or that a LoRA does not have, in `whole` what is no embedding or head.
    """
    require_model(lm)
    if not isinstance(spec, LoRA | None):
        raise BadInput(f"{spec!r:.60} is no LoRA; give one, or its fields: lq.lora(lm, rank=4)")
    if spec is not None and fields:
        raise BadInput("give a LoRA or its fields, not both")
    known = [field.name for field in dataclasses.fields(LoRA)]
    for name in fields:
        if name not in known:
            hint = meant_by(name, [f"lora_{field}" for field in known], _as_argument)
            raise BadInput(f"LoRA has no field {name!r}; {hint or 'choose from ' + ', '.join(known)}")
    spec = LoRA(**fields) if spec is None else spec
    variables = add_adapters(lm.variables, lm.model.layer_paths(), spec, module_names(lm.config), seed)
    return lm.replace(variables=variables)


def _as_argument(option: str, value: str = "") -> str:
    """An argument of `lora` in the place of a recipe's option: rank of --lora-rank."""
    name = option.removeprefix("lora_")
    return f"{name}={value!r}" if value else name


def merge(lm: LanguageModel) -> LanguageModel:
    """The same model without adapters: their products are added to the matrices, which keep their type. In bfloat16
    that may round away a good part of a small update. A model without adapters stays as it is."""
    require_model(lm)
    return lm.replace(variables=low_rank.merge(low_rank.spread(lm.variables)))


def unmerge(merged: LanguageModel, adapted: LanguageModel) -> LanguageModel:
    """The inverse of `merge`, up to rounding: the adapters of `adapted` are subtracted from the matrices of `merged`
    and stand beside them. LoRA's may stand beside any matrices in `adapted`, DoRA's only beside those that they were
    merged into, which tell how long the columns were. BadInput for matrices that `merged` lacks, and for a DoRA with a
    magnitude of 0, or beside another base's matrices."""
    require_model(merged)
    require_model(adapted)
    return merged.replace(variables=low_rank.unmerge(merged.variables, adapted.variables))


def load_adapter(lm: LanguageModel, folder: str | os.PathLike[str]) -> LanguageModel:
    """The model with the adapters of a PEFT folder or hub id, in place of any that it had.

    A head or an embedding that PEFT keeps with them (`modules_to_save`) replaces the model's own, and so do a tokenizer
    and a `generation_config.json` beside them: the adapters were trained with these. BadInput: there is no adapter, it
    is damaged or of a kind that is not supported, or it belongs to another base; the model has the embedding or the
    head of other adapters.
    """
    require_model(lm)
    path = find(folder)
    if not path.is_dir() or not is_adapter(path):
        raise BadInput(f"{folder}: holds no adapter_config.json; give a folder that PEFT or lq.save_adapter wrote")
    if low_rank.WHOLE in lm.variables.get(low_rank.LORA_FIXED, {}):
        raise BadInput(
            "this model has the embedding or the head of other adapters in place of its base's; load the base, then "
            "these adapters onto it"
        )
    config, variables = read_adapter(path, lm.config, low_rank.without_adapters(lm.variables))
    changes = {} if config == lm.config else {"config": config}
    adapted = lm.replace(variables=variables, **changes)
    return _with_own_text_files(adapted, path)


def load_with_base(folder: Path, layout: str, config: Any, dtype: Any, is_path: bool) -> LanguageModel:
    """The base that a PEFT folder names, with the folder's adapters; see `load`. As in transformers, a model in the
    folder itself is the base whatever the name says, unless the folder is a copy from the hub (`is_path` False) that
    names a base: there, weights beside adapters may have them merged already."""
    base, classes, beside = decided(lambda: [*base_of(folder), (folder / CONFIG).is_file() and is_hf(folder)])
    if beside and (is_path or not base):
        if base and not (os.path.isdir(base) and folder.samefile(base)):
            warn(
                f"{folder}: its adapters go onto the model beside them, not onto {base}; if that model is merged, and "
                "has them already, move its adapter_config.json away"
            )
        lm = load_weights(folder, folder, layout, config, dtype)
    elif not base:
        raise BadInput(f"{folder}: is an adapter that names no base; load that, then lq.load_adapter(lm, folder)")
    else:
        lm = _load_base(base, folder, layout, config, dtype)
    if classes and lm.config.labels is None:
        lm = with_classifier(lm, numbered_labels(classes))
    return load_adapter(lm, folder)


def _load_base(base: str, folder: Path, layout: str, config: Any, dtype: Any) -> LanguageModel:
    """The base that an adapter's folder names; BadInput, which names the folder, where it cannot be loaded."""
    try:
        path = agreed(lambda: find(base, config=config))
        if not decided(lambda: is_adapter(path)):
            return load(base, layout, config, dtype)
    except BadInput as error:
        raise BadInput(
            f"{folder}: its base {base} cannot be loaded: {error}. Another copy of that model, unquantised, will do: "
            f'lq.load_adapter(lq.load("..."), "{folder}"), or its name in adapter_config.json (base_model_name_or_path)'
        ) from error
    raise BadInput(f"{folder}: its base {base} is an adapter too; merge that one into its own base first")


def _with_own_text_files(lm: LanguageModel, folder: Path) -> LanguageModel:
    """The model with the tokenizer that trainers save beside adapters: these were trained with its chat template. Its
    end token ends a text as well; where a `generation_config.json` there names end tokens, only those do."""
    own = tokenizer_in(folder, without="keeps the tokenizer of the base")
    if own is not None and own.vocab_size > lm.config.vocab_size:
        warn(f"{folder}: its tokenizer has {own.vocab_size} tokens, the base {lm.config.vocab_size}: its own stays")
        return lm
    generation = lm.generation.with_end(None if own is None else own.end_of_text)
    if values := read_generation_config(folder, known=generation.other):  # of what its base says, loading that has told
        generation = GenerationConfig.from_hf(generation.to_hf() | values)
    return lm.replace(tokenizer=lm.tokenizer if own is None else own, generation=generation)


def save_adapter(
    lm: LanguageModel, folder: str | os.PathLike[str], *, base: str | os.PathLike[str] = "", overwrite: bool = False
) -> Path:
    """Write the adapters as a folder that PEFT loads. `base`, a hub id or a path, names there the model without them.
    Without it the folder is loaded by `load_adapter`, or by PEFT onto a base that it is given.

    The tokenizer, with its chat template, and `generation_config.json` go beside them. Returns the folder. What may be
    replaced is as in `save_hf`. BadInput: the model has no adapters, or one that PEFT has no form for.
    """
    require_model(lm)
    text_files = TextFiles(lm.tokenizer, lm.generation)
    return write_adapter(lm.variables, lm.config, folder, os.fspath(base), overwrite, text_files)
