"""A model's files: `load` reads any of the formats, `save` writes our own."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.data.tokenizer_loading import tokenizer_in
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput, at_place
from llmq_jax.field_types import float_type, require_model
from llmq_jax.interop.architectures import config_class_of
from llmq_jax.interop.generation_config import GENERATION_CONFIG, GenerationConfig, read_generation_config
from llmq_jax.interop.gguf import LAYOUT as GGUF
from llmq_jax.interop.gguf import is_gguf, read_gguf
from llmq_jax.interop.huggingface import (
    CONFIG,
    find,
    is_hf,
    open_weights,
    read_hf,
)
from llmq_jax.interop.nanogpt import LAYOUT as NANOGPT
from llmq_jax.interop.nanogpt import is_nanogpt, read_nanogpt
from llmq_jax.interop.openai import HPARAMS, is_openai, read_openai
from llmq_jax.interop.openai import LAYOUT as OPENAI
from llmq_jax.interop.peft import is_adapter
from llmq_jax.interop.tensor_files import write_json
from llmq_jax.language_model import LanguageModel, differing_weight
from llmq_jax.models import PRESETS, architecture, build, config_from_fields, fields_from_text, override
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.whole_folders import check_target, whole_folder


def load(
    path: str | os.PathLike[str], layout: str = "hf", config: Any = None, dtype: Any = None, mesh: Any = None
) -> LanguageModel:
    """Load a model: a Hugging Face folder, a hub id, a file of weights, GGUF, nanoGPT's `ckpt.pt`, OpenAI's GPT-2, or a
    run of ours.

    A hub id may name a revision, a commit or a tag, to get the same files for ever: "org/name@revision". A GGUF file
    on the hub is named by "org/name/file.gguf".

    Parameters keep the file's type unless `dtype` is given ("float32", "bfloat16", ...). `layout` names the layout of
    the weights in a folder or file: "hf", for GPT-2 also "book", "original" and "nanogpt". `config` takes the place of
    the one stored with the weights. A dict changes just some of its fields; for weights that come without one it gives
    the fields that their shapes do not tell: `load("gpt2.pth", layout="book", config={"num_attention_heads": 12})`.

    A PEFT folder is loaded onto the base that it names; `adapters.load_adapter` loads it onto another. The variables
    are sharded over `mesh` (a text such as "fsdp=4,tensor=2", or the result of `training.make_mesh`), else over the
    mesh that is set, if one is. If its devices are those of several processes, all of them load together, each from
    what `path` names on its machine.

    BadInput, which names the file: there is no model, it is damaged, an architecture or a field that changes the
    computation is not supported, weights and config do not fit each other, or processes have different weights.
    """
    from llmq_jax.training.sharding import copies_compared, make_mesh, place

    if not isinstance(path, str | os.PathLike) or not str(path):
        raise BadInput(f"path={path!r} names no model; give a path or a hub id, as a text")
    if isinstance(config, Mapping):
        for name in config:
            if not isinstance(name, str):
                raise BadInput(f"config={dict(config)!r:.60}: {name!r:.60} is no name of a field")
    elif config is not None:
        architecture(config)
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh), copies_compared(str(path)):
        lm = _load(path, layout, config, dtype)
        return lm.replace(variables=place(lm.variables))


def _load(path: str | os.PathLike[str], layout: str, config: Any, dtype: Any) -> LanguageModel:
    dtype = float_type(dtype)
    if str(path) in PRESETS and not Path(path).exists():
        raise BadInput(f"{path}: is a preset, a size without weights; use it to train, or name a model")
    source = agreed(lambda: find(path, config=config))
    checkpoint = _checkpoint(source)
    if checkpoint is not None:
        _refuse_layout(path, layout, "a checkpoint of ours")
        return _load_checkpoint(source, checkpoint, config, dtype)
    if decided(lambda: is_adapter(source)):
        from llmq_jax.adapters import load_with_base

        return load_with_base(source, layout, config, dtype, is_path=Path(path).expanduser().exists())
    return load_weights(path, source, layout, config, dtype)


def load_weights(path: str | os.PathLike[str], source: Path, layout: str, config: Any, dtype: Any) -> LanguageModel:
    """`load` for anything but a checkpoint of ours or an adapter; `path` is the name that the user gave."""
    if is_nanogpt(source):
        _refuse_layout(path, layout, "a checkpoint of nanoGPT's", NANOGPT)
        contents = read_nanogpt(source, config, dtype)
    elif is_hf(source):
        contents = read_hf(source, layout, config, dtype)
    elif is_openai(source):
        _refuse_layout(path, layout, "a folder of OpenAI's", OPENAI)
        contents = read_openai(source, config, dtype)
    elif is_gguf(source):
        _refuse_layout(path, layout, "a GGUF file", GGUF)
        contents = read_gguf(source, config, dtype)
    else:
        raise BadInput(
            f"{path}: is {_describe(source)}, not a model; give a Hugging Face folder (with model.safetensors or "
            "pytorch_model.bin), a file of weights (.safetensors, .bin, .pth), a GGUF file, OpenAI's GPT-2 folder, a "
            "hub id, a run folder or a checkpoint"
        )
    return LanguageModel(
        contents.config, build(contents.config), contents.variables, contents.tokenizer, contents.generation
    )


def _refuse_layout(path: object, layout: str, what: str, own: str = "hf") -> None:
    """BadInput for a layout other than the default and the `own` one, of files that have no choice of it."""
    if layout not in ("hf", own):
        raise BadInput(f"{path}: is {what}; layout={layout!r} would have no effect")


def has_config(source: Path) -> bool:
    """Whether a config comes with the weights at `source`; without one `load` may need its `config`."""
    from llmq_jax.training.checkpoints import find_checkpoint

    folder = source.parent if source.is_file() else source
    has_file = any((folder / name).is_file() for name in (CONFIG, HPARAMS))
    has_own = is_nanogpt(source) or is_gguf(source) or is_adapter(source)
    return has_file or has_own or find_checkpoint(source) is not None


def fields_of_weights(source: Path, layout: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Fields of the config of weights that come without one, from words as in `fields_from_text`; empty for what is no
    model, which `load` refuses."""
    if not (is_hf(source) or is_openai(source)):
        return {}
    with at_place(source):
        config_class = config_class_of(open_weights(source), layout) if is_hf(source) else GPT2Config
        return fields_from_text(config_class, assignments)


def free_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """A folder that `save` may write. BadInput: it is not empty, or with `overwrite` not what `save` wrote."""
    from llmq_jax.training.checkpoints import CHECKPOINTS, Checkpoints

    folder = Path(folder).expanduser()
    step = Checkpoints(folder / CHECKPOINTS).path(0)  # `save` writes this checkpoint and nothing else
    check_target(folder, overwrite, CHECKPOINTS, (CHECKPOINTS,))
    if step.parent.exists():
        check_target(step.parent, overwrite, step.name, (step.name,))
    return folder


def save(lm: LanguageModel, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a model in our own format, which `load` and every recipe's `--init-from` read; returns the folder.

    It must not exist or be empty; `overwrite=True` replaces one that holds nothing but what an earlier `save` wrote.
    Else it is BadInput. It appears complete or not at all.
    """
    from llmq_jax.training.checkpoints import CHECKPOINTS, Checkpoints

    require_model(lm)
    folder = free_folder(folder, overwrite)
    files = TextFiles(lm.tokenizer, lm.generation)
    with whole_folder(folder.resolve()) as partial:
        checkpoints = Checkpoints(partial / CHECKPOINTS)
        checkpoints.save(0, {"variables": lm.variables}, model_config=lm.config, tokenizer=files)
    return folder


@dataclass(frozen=True)
class TextFiles:
    """The tokenizer's files and `generation_config.json`, which a checkpoint stores together as its tokenizer."""

    tokenizer: Tokenizer | None
    generation: GenerationConfig

    def save(self, folder: str | os.PathLike[str]) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(Path(folder))
        write_json(Path(folder) / GENERATION_CONFIG, self.generation.to_hf())

    @classmethod
    def read(cls, folder: Path, name: str) -> "TextFiles":
        """`name` names the tokenizer. Without a generation config, its end-of-text token ends texts."""
        tokenizer = tokenizer_in(folder, name)
        values = read_generation_config(folder)
        if values is None:
            values = {"eos_token_id": None if tokenizer is None else tokenizer.end_of_text}
        return cls(tokenizer, GenerationConfig.from_hf(values))


def agreed(action: Callable[[], Any]) -> Any:
    """The action's result; of several processes, all raise its BadInput where one does."""
    from llmq_jax.training.processes import together
    from llmq_jax.training.sharding import spans_processes

    return together(action) if spans_processes() else action()


def decided(action: Callable[[], Any]) -> Any:
    """The action's result, on which the reading of a model depends; of several processes, process 0's, on all: they
    must go through the same exchanges."""
    from llmq_jax.training.processes import of_first
    from llmq_jax.training.sharding import spans_processes

    return of_first(action) if spans_processes() else action()


def _checkpoint(source: Path) -> Path | None:
    """A checkpoint, or a run, whose newest one is meant; of several processes, the checkpoint that process 0 finds: of
    a run that goes on another may see an older or a newer one."""
    from llmq_jax.training.checkpoints import find_checkpoint
    from llmq_jax.training.processes import of_first
    from llmq_jax.training.sharding import spans_processes

    if not spans_processes():
        return None if find_checkpoint(source) is None else source

    def newest() -> str | None:
        found = find_checkpoint(source)
        return None if found is None else str(found.relative_to(source))

    name = of_first(newest)
    return None if name is None else source / name


def _load_checkpoint(path: Path, checkpoint: Path, config: Any, dtype: np.dtype | None) -> LanguageModel:
    """The model in a checkpoint, or in the newest one of the run `checkpoint`; `path` gives its tokenizer a name."""
    from llmq_jax.training import parts
    from llmq_jax.training.checkpoints import load_checkpoint_variables

    loaded = load_checkpoint_variables(checkpoint)
    variables = parts.whole(loaded.variables)
    if config is None:
        config = _config(path, loaded.config)
    else:
        if isinstance(config, Mapping):
            config = override(_config(path, loaded.config), **config)
        differing = differing_weight(variables, config)
        if differing is not None:
            raise BadInput(f"{path}: {differing}")
    if dtype is not None:  # that of parameters: a router's bias keeps its own
        params = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, variables["params"]
        )
        variables = {**variables, "params": params}
    files = TextFiles(None, GenerationConfig())
    if loaded.tokenizer_folder:
        files = TextFiles.read(loaded.tokenizer_folder, path.resolve().name)
    return LanguageModel(config, build(config), variables, files.tokenizer, files.generation)


def _config(path: Path, fields: dict[str, Any]) -> Any:
    """A config dataclass from the dict that a checkpoint keeps."""
    with at_place(str(path)):
        return config_from_fields(fields)


def _describe(path: Path) -> str:
    if path.is_file():
        return f"a {path.suffix} file" if path.suffix else "a file"
    from llmq_jax.training.run_config import read_run_config

    if read_run_config(path / CONFIG) is not None:
        return "the folder of a run without a checkpoint"
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"a folder with {', '.join(names[:4])}{more}"
