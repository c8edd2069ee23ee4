"""The base of adapters: the model that their run began with, by a name under which others find it."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

PATH_ENDINGS = (".gguf", ".safetensors", ".bin", ".pth")


class Base(NamedTuple):
    """What is known of a base."""

    name: str
    """For adapter_config.json: a hub id or an absolute path; "" where none can be given."""
    said: str
    """One line about it, for the user."""
    for_peft: bool
    """Whether transformers, and so PEFT, loads it."""


def found_base(source: str) -> Base:
    """The base of the adapters in a run, a checkpoint or a PEFT folder.

    A path is made absolute: a relative one would mean another place where it is read elsewhere. A run that continued
    the adapters of another run has that run's base.
    """
    from llmq_jax.interop.huggingface import find

    name = began_with(find(source))
    if name is None:
        return unnamed(f"{source} does not say what it began with")
    seen = set()
    while (path := Path(name).expanduser().resolve()).exists() and path not in seen:
        seen.add(path)
        if not has_adapters(path):
            return of_path(path)
        further = began_with(path)
        if further is None:
            break
        name = further
    if path.exists():
        return unnamed(f"it began with {name}, whose adapters have none that is known")
    if is_lost_path(name):
        return unnamed(f"it began with {name}, which is not there")
    return of_hub(name, f"base: {name}, with which it began, as a name on the hub; --base names another")


def unnamed(why: str) -> Base:
    return Base("", f"base: none is named in adapter_config.json, as {why}; name it with --base", False)


def of_path(path: Path) -> Base:
    from llmq_jax.interop.huggingface import CONFIG, is_hf

    if path.is_dir() and is_hf(path) and (path / CONFIG).is_file():
        return Base(str(path), f"base: {path}, on this computer; --base names it for others, as by its hub id", True)
    return for_here_alone(str(path))


def of_hub(name: str, said: str) -> Base:
    from llmq_jax.interop.huggingface import is_hub_file

    return for_here_alone(name) if is_hub_file(name) else Base(name, said, True)


def for_here_alone(name: str) -> Base:
    said = (
        f"base: {name}, which loads here alone; PEFT and others want a Hugging Face folder: write one "
        f"(python -m convert.to_hf {shlex.quote(name)} FOLDER) and name that with --base"
    )
    return Base(name, said, False)


def given_base(name: str) -> Base:
    """The base that --base names, under that very name."""
    path = Path(name).expanduser()
    if path.exists() and has_adapters(path):  # exported as a whole model it would have them in its weights
        return Base(
            name, f"base: {name}, which loads here alone, without its own adapters; name what it began with", False
        )
    own = of_path(path) if path.exists() else of_hub(name, f"base: {name}")
    return Base(name, f"base: {name}", True) if own.for_peft else own._replace(name=name)


def began_with(path: Path) -> str | None:
    """The model that a run says it began with, or the base that a PEFT folder names; None for anything else."""
    from llmq_jax.interop.peft import is_adapter
    from llmq_jax.interop.peft_reader import base_of

    if is_adapter(path):
        return base_of(path)[0] or None
    name = run_options(path).get("init_from")
    return name if isinstance(name, str) else None


def has_adapters(path: Path) -> bool:
    """Whether a run trained adapters, or a PEFT folder holds some."""
    from llmq_jax.interop.peft import is_adapter

    return is_adapter(path) or run_options(path).get("train") == "lora"


def run_options(path: Path) -> dict[str, Any]:
    """The options of the run in a folder, or of the run that a checkpoint belongs to; {} where there is no run."""
    from llmq_jax.interop.tensor_files import read_json
    from llmq_jax.training.checkpoints import find_checkpoint
    from llmq_jax.training.run_config import CONFIG, MARK

    checkpoint = find_checkpoint(path)
    file = checkpoint.resolve().parents[1] / CONFIG if checkpoint is not None else path / CONFIG
    options = read_json(file) if checkpoint is not None and file.is_file() else {}
    return options if MARK in options else {}


def is_lost_path(name: str) -> bool:
    """Whether a name that is not on this disk can only be a path, not a hub id."""
    from llmq_jax.interop.huggingface import is_hub_file, is_hub_id

    if "/" in name and Path(name).parent.is_dir():
        return True
    return not is_hub_file(name) and (not is_hub_id(name.partition("@")[0]) or name.endswith(PATH_ENDINGS))
