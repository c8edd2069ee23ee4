"""Checkpoints: one atomic save of state, model config and tokenizer, verified when it is read.

    checkpoints/00002000/state/            the state, an Orbax PyTree
                         frozen-1f3a…/     a part of it that other checkpoints may share: another PyTree
                         config.json       the model's config
                         tokenizer/        the tokenizer's files, where the run has a tokenizer
                         checkpoint.json   step, tokens seen, what the step is judged by, version of this format
                         manifest.json     size and SHA-256 of all the files above

A save fills the hidden folder `.saving-00002000`, writes the manifest last, puts everything on the disk, and then
renames the folder: that one rename is the commit mark. A deletion first renames to a hidden name. So whatever instant
the process is killed at, a folder with a plain number is a whole checkpoint.

Collections that do not train, such as the base below adapters, and the entries of `TrainState.carried`, such as GRPO's
reference, are folders of their own, written where they have changed since the newest checkpoint. Such a folder is named
by the fingerprint of its arrays, and where the newest checkpoint has one of that name, a save makes hard links to the
files in it. So each checkpoint is whole by itself, and these files are on the disk once, until the last checkpoint with
them is deleted. On a file system without hard links they are written with each.
"""

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import traverse_util

from llmq_jax.atomic_files import json_bytes, sync_folder
from llmq_jax.errors import BadInput
from llmq_jax.field_types import create
from llmq_jax.json_text import parse_json
from llmq_jax.layers.axes import axis_sizes, note, sharding_of
from llmq_jax.training.checkpoint_arrays import STATE, Name, named_leaves, parts_of, read_arrays, write_arrays
from llmq_jax.training.manifest import (
    MANIFEST,
    CorruptCheckpoint,
    Entries,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from llmq_jax.training.processes import first, of_first, share, wait_for_all

JudgedBy = tuple[str, Literal["lowest", "highest"]]
"""The validation metric that tells how good a step is, and which of its values is best."""

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, in that of the run."""
VERSION = 3
CONFIG, TOKENIZER, INFO = "config.json", "tokenizer", "checkpoint.json"
SAVING, DELETING, DAMAGED = ".saving-", ".deleting-", "damaged-"
MARGIN = 2**20  # bytes beside the arrays: their metadata, the tokenizer, records


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    step: int
    tokens: int = 0
    """Tokens trained on up to this step."""
    judged_by: str | None = None
    """Which validation mean `value` is: "loss", "reward". None in format 1, which did not say: there it is the loss, or
    the reward with its sign turned."""
    best: str = "lowest"
    """Which value is best: "lowest" or "highest"."""
    value: float | None = None
    """None where this step was not evaluated."""
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.best not in ("lowest", "highest"):
            raise BadInput(f"best={self.best!r} is neither lowest nor highest")


class Restored(NamedTuple):
    state: Any
    info: CheckpointInfo


class LoadedCheckpoint(NamedTuple):
    config: dict[str, Any]
    """The model's config, with `model_type`."""
    variables: dict[str, Any]
    tokenizer_folder: Path | None
    info: CheckpointInfo


class Checkpoints:
    """The checkpoints of one run, in `folder`. Of the committed ones the newest `keep_last` stay, and the one that the
    run names as its best.

    With several processes, all of them call `save` and `restore`; process 0 writes what is not an array.
    """

    def __init__(self, folder: str | Path, keep_last: int = 3):
        if keep_last < 1:
            raise BadInput(f"keep_last is {keep_last}; at least 1 checkpoint must be kept to resume from")
        self.folder = Path(folder)
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        numbers = filter(str.isdecimal, os.listdir(self.folder))
        return sorted(int(name) for name in numbers if self.path(int(name)).name == name)  # "300" is somebody's copy

    def latest_step(self) -> int | None:
        """The step of the newest committed checkpoint; None where there is none."""
        return max(self.steps(), default=None)

    def judged_by(self) -> JudgedBy | None:
        """What steps are judged by, from the newest checkpoint that says it; None where none does."""
        for _, info in self._read_infos(reversed(self.steps())):
            if info.judged_by is not None:
                return info.judged_by, "highest" if info.best == "highest" else "lowest"
        return None

    def values(self, judged_by: JudgedBy) -> list[tuple[int, float]]:
        """(step, value) of the checkpoints whose steps were judged by this."""
        return [
            (step, info.value)
            for step, info in self._read_infos(self.steps())
            if info.value is not None and (info.judged_by, info.best) == judged_by
        ]

    def _read_infos(self, steps: Iterable[int]) -> Iterator[tuple[int, CheckpointInfo]]:
        """(step, what its checkpoint says of itself) for those of these steps whose checkpoints can be read."""
        for step in steps:
            with contextlib.suppress(BadInput):
                yield step, read_info(self.path(step))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"{step:08d}"

    def save(
        self,
        step: int,
        state: Any,
        *,
        model_config: Any = None,
        tokenizer: Any = None,
        judged_by: JudgedBy = ("loss", "lowest"),
        value: float | None = None,
        tokens: int = 0,
        best_step: int | None = None,
    ) -> Path:
        """Commit the state, any pytree of arrays, as the checkpoint of `step`; then delete what need not be kept.

        `model_config` is a dict or a config dataclass; `tokenizer` has a method `save(folder)`; `value` is that of the
        mean `judged_by`, where the step was evaluated; the checkpoint of `best_step`, this or an earlier one, stays. A
        save that fails, as where there is no room, leaves nothing behind.
        """
        target = self.path(step)
        saving = self.folder / f"{SAVING}{target.name}"
        parts = parts_of(state)
        if first():
            _discard(saving)
            saving.mkdir(parents=True)
        try:
            linked: Entries = {}
            apart = sorted({*parts} - {STATE})
            newest = self.path(self.latest_step() or 0)
            there = _entries(newest) if apart and first() else {}
            for part in apart:
                if files := of_first(partial(_linked, newest, there, saving, part)):
                    linked |= files
                    del parts[part]
            _check_room(self.folder, parts)
            write_arrays(saving, parts)
            if first():
                found = float(value) if value is not None and math.isfinite(value) else None
                info = CheckpointInfo(step, tokens, *judged_by, value=found)
                (saving / CONFIG).write_bytes(json_bytes(config_dict(model_config)))
                (saving / INFO).write_bytes(json_bytes(dataclasses.asdict(info)))
                if tokenizer is not None:
                    (saving / TOKENIZER).mkdir()
                    tokenizer.save(saving / TOKENIZER)
                write_manifest(saving, linked)
                self._delete(target)  # there is one only where a step is saved a second time
                os.rename(saving, target)
        except Exception:
            if first():
                _discard(saving)
            raise
        if first():
            sync_folder(self.folder)
        self.delete_old(best_step)
        return target

    def restore(self, example: Any, step: int | None = None, warn: Callable[[str], None] = print) -> Restored | None:
        """The state of `step`, bit for bit, laid out like `example`: a state of the run, or its `jax.eval_shape`.

        Without `step`: the newest checkpoint that is whole, a line to `warn` for each newer one that is not, and None
        where none was ever saved. CorruptCheckpoint where all are damaged, or the one asked for; BadInput where a
        checkpoint is of another model or optimizer than `example`.
        """
        if step is None:
            # One process chooses for all: on a shared file system others may not see the newest one yet.
            step = of_first(lambda: self._newest_whole(warn))
            return None if step is None else read_checkpoint(self.path(step), example)
        steps = of_first(self.steps)
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise BadInput(f"no checkpoint of step {step} in {self.folder}; steps there: {there}")
        return restore_checkpoint(self.path(step), example)

    def _newest_whole(self, warn: Callable[[str], None]) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                _verify(self.path(step))
                return step
            except CorruptCheckpoint as error:
                if step == steps[0]:
                    raise CorruptCheckpoint(f"no checkpoint in {self.folder} is whole; {error}") from None
                warn(f"warning: {error}; going back to an earlier one")
        return None

    def delete_old(self, best_step: int | None = None) -> None:
        """Delete the checkpoints that need not be kept: all but the last ones and that of `best_step`. Each save ends
        with it, unless the process is killed."""
        steps = self.steps() if first() else []
        for step in steps[: -self.keep_last]:
            if step != best_step:
                self._delete(self.path(step))
        wait_for_all("old checkpoints deleted")

    def remove_leftovers(self) -> None:
        """Delete what a killed process left: half-saved and half-deleted checkpoints. For the owner of the run only."""
        for name in os.listdir(self.folder) if first() and self.folder.is_dir() else []:
            if name.startswith((SAVING, DELETING)):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        wait_for_all("leftovers removed")

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than `step`, `00000300` to `damaged-00000300`: a run that went back to `step` does
        not count them any more, and leaves it to the user to delete them."""
        wait_for_all("checkpoint chosen")
        for newer in self.steps() if first() else []:
            if newer > step:
                aside = self.folder / f"{DAMAGED}{self.path(newer).name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.path(newer), aside)
        wait_for_all("newer ones set aside")

    def _delete(self, checkpoint: Path) -> None:
        """Delete a checkpoint, if it is there. What cannot be deleted, as on NFS while another process has a file of it
        open, is hidden at least, and the run goes on."""
        if checkpoint.exists():
            hidden = Path(tempfile.mkdtemp(prefix=DELETING, dir=self.folder))
            os.rename(checkpoint, hidden / checkpoint.name)
            shutil.rmtree(hidden, ignore_errors=True)


def _entries(checkpoint: Path) -> Entries:
    """The entries of its manifest; none where it cannot be read."""
    try:
        return read_manifest(checkpoint)
    except (CorruptCheckpoint, OSError):
        return {}


def _linked(newest: Path, entries: Entries, saving: Path, part: str) -> Entries:
    """Link the newest checkpoint's files in the folder `part` into `saving`; those of its `entries` that they have.
    Empty where it has no such folder, where one of the files is missing by now or has another size, and on file systems
    without hard links."""
    files = {name: entry for name, entry in entries.items() if name.split("/")[0] == part}
    try:
        for name, entry in files.items():
            if (newest / name).stat().st_size != entry["size"]:
                raise OSError(f"{name} has another size")
            (saving / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(newest / name, saving / name)
        return files
    except OSError:
        shutil.rmtree(saving / part, ignore_errors=True)
        return {}


def _check_room(folder: Path, arrays: Any) -> None:
    """OSError, in all processes, where the disk has too little room for the arrays: Orbax would write until the disk is
    full, for others too, and then complain in several places at once."""
    size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(arrays))
    free = share(shutil.disk_usage(folder).free if first() else None)
    if free < size + max(size // 20, MARGIN):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _discard(folder: Path) -> None:
    """Delete a save that failed, into which a thread of Orbax's may still write."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint that `path` means: itself, or the newest of a run folder (or of its `checkpoints/`); None where
    there is none."""
    path = Path(path)
    if (path / INFO).is_file():
        return path
    for folder in (path / CHECKPOINTS, path):
        checkpoints = Checkpoints(folder)
        if (step := checkpoints.latest_step()) is not None and (checkpoints.path(step) / INFO).is_file():
            return checkpoints.path(step)
    return None


def restore_checkpoint(folder: Path, example: Any) -> Restored:
    """The state in the folder of a checkpoint, as `Checkpoints.restore` gives it."""
    of_first(lambda: _verify(folder))
    return read_checkpoint(folder, example)


def read_checkpoint(folder: Path, example: Any) -> Restored:
    """The state in the folder of a checkpoint that is verified already."""
    wanted = named_leaves(example)

    def choose(saved: Mapping[Name, Any]) -> Mapping[Name, Any]:
        _check_same_arrays(folder, saved, wanted)
        return wanted

    restored = read_arrays(folder, choose)
    leaves = [restored[name] for name in wanted]
    return Restored(jax.tree.unflatten(jax.tree.structure(example), leaves), read_info(folder))


def _verify(folder: Path) -> None:
    verify_manifest(folder)
    read_info(folder)


def load_checkpoint_variables(path: str | Path) -> LoadedCheckpoint:
    """What inference needs of a checkpoint: `(config, variables, tokenizer_folder, info)`.

    `path` is a checkpoint, or a run folder, which stands for its newest one. Nothing need be known of the optimizer
    that wrote it, whose arrays are verified but not read. The variables lie on the default device; where a mesh is set,
    they are read straight to the devices that have their parts.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise BadInput(f"no checkpoint in {path}; give a run folder or one of the folders in its checkpoints/")
    try:
        return _load_variables(folder)
    except Exception:
        if folder.exists():
            raise
        # A run that goes on has deleted it meanwhile, and has a newer one.
        if find_checkpoint(path) is None:
            raise BadInput(f"{folder}: was deleted while it was read, as by a run that goes on; start again") from None
        return load_checkpoint_variables(path)


def _load_variables(folder: Path) -> LoadedCheckpoint:
    verify_manifest(folder)
    note((folder / MANIFEST).read_bytes())  # in place of the arrays, of which a process reads its own parts
    config = read_config(folder)

    def choose(saved: Mapping[Name, Any]) -> Mapping[Name, Any]:
        wanted = {name: _where_wanted(name, array) for name, array in saved.items() if name[0] == "variables"}
        if not wanted:
            raise BadInput(f"checkpoint {folder} holds no model variables; give one that training saved")
        return wanted

    arrays = read_arrays(folder, choose)
    variables = traverse_util.unflatten_dict({name[1:]: array for name, array in arrays.items()})
    tokenizer = folder / TOKENIZER
    return LoadedCheckpoint(config, variables, tokenizer if tokenizer.is_dir() else None, read_info(folder))


def _where_wanted(name: Name, array: Any) -> Any:
    """The array's shape and type, with its place on the mesh if one is set."""
    sharding = sharding_of(name, array) if axis_sizes() else None
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _check_same_arrays(folder: Path, saved: Mapping[Name, Any], wanted: Mapping[Name, Any]) -> None:
    """Orbax would cast a dtype in silence and take a wrong shape for a slice."""
    faults = []
    for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (name[0] != "variables", name)):
        here, there = wanted.get(name), saved.get(name)
        if here is None or there is None:
            faults.append(f"{'/'.join(name)} is {'unknown here' if here is None else 'not in it'}")
        elif tuple(here.shape) != tuple(there.shape) or here.dtype != there.dtype:
            faults.append(
                f"{'/'.join(name)} is {there.dtype}{list(there.shape)} in it and {here.dtype}{list(here.shape)} here"
            )
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        if faults[0].startswith("optimizer_state/"):  # after those of the variables, and other state
            raise BadInput(
                f"checkpoint {folder} is of another optimizer, though of this model: {faults[0]}{more}; use the "
                "optimizer, with the type of its moments, and the version that it was trained with, or begin a run "
                "with its weights alone (--init-from, in Python lq.load)"
            )
        raise BadInput(
            f"checkpoint {folder} is of another model or optimizer: {faults[0]}{more}; "
            f"use the options, and the version, that it was trained with, or another folder"
        )


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: {CONFIG} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: {CONFIG} holds no JSON object")
    return config


def read_info(folder: Path) -> CheckpointInfo:
    try:
        info = parse_json((folder / INFO).read_bytes())
        version = info["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: {INFO} cannot be read") from None
    if version not in range(1, VERSION + 1):
        raise BadInput(
            f"checkpoint {folder} has format {version}; this llmq_jax reads formats 1 to {VERSION}: update it"
        )
    if version == 1:
        info["value"] = info.pop("validation_loss", None)
    try:
        return create(CheckpointInfo, info)
    except BadInput as error:
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: {INFO}: {error}") from None


def config_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as transformers writes it: its fields and its `model_type`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.asdict(config)
        config = type(config)
        return {"model_type": config.model_type, **fields}
    described: dict[str, Any] = config or {}
    return described
