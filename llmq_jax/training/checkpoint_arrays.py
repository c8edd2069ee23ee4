"""The arrays of a checkpoint, in PyTrees of Orbax: `state/`, and a folder for each part that other checkpoints may
share. The rest of a checkpoint is in checkpoints.py."""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import path_names
from llmq_jax.training.fingerprint import fingerprint
from llmq_jax.training.state import TrainState

Name = tuple[str, ...]
"""The path of an array in the state."""
STATE, FROZEN = "state", "frozen-"


def named_leaves(tree: Any) -> dict[Name, Any]:
    """Every leaf by its path: names of dataclass fields and dict keys, indices of tuples. On disk the state is this
    nested dict, so that readers need not know the optimizer's classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_names(path): leaf for path, leaf in leaves}


def parts_of(state: Any) -> dict[str, dict[Name, Any]]:
    """The arrays by the folder that they are saved in: `state`, and one for each collection that does not train and for
    each entry of `carried`."""
    trained: dict[Name, Any] = {}
    others: dict[Name, dict[Name, Any]] = {}
    for name, array in named_leaves(state).items():
        apart = isinstance(state, TrainState) and (
            name[0] == "carried" or (name[0] == "variables" and name[1] not in state.changing)
        )
        (others.setdefault(name[:2], {}) if apart else trained)[name] = array
    return {STATE: trained} | {FROZEN + fingerprint(arrays): arrays for arrays in others.values()}


def write_arrays(folder: Path, parts: Mapping[str, Mapping[Name, Any]]) -> None:
    """Write each of these parts into a folder of its name."""
    with _orbax() as (ocp, checkpointer):
        for part, arrays in parts.items():
            tree = traverse_util.unflatten_dict(arrays)
            checkpointer.save(folder.absolute() / part, args=ocp.args.PyTreeSave(tree))


def read_arrays(folder: Path, choose: Callable[[dict[Name, Any]], Mapping[Name, Any]]) -> dict[Name, jax.Array]:
    """The arrays that `choose` wants, and no others. It is given {name: shape and type} of all that are saved, and
    returns what the array of each name is to be placed like."""
    with _orbax() as (ocp, checkpointer):
        parts = _saved_arrays(checkpointer, folder)
        wanted = choose({name: array for saved in parts.values() for name, array in saved.items()})
        # Never left to Orbax: it would look for the devices that the checkpoint was saved from.
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def described(array: Any) -> Any:
            sharding = getattr(array, "sharding", None)
            sharding = sharding if isinstance(sharding, jax.sharding.Sharding) else default
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

        arrays: dict[Name, jax.Array] = {}
        for part, saved in parts.items():
            tree = traverse_util.unflatten_dict({name: described(wanted[name]) for name in saved if name in wanted})
            if tree:
                arguments = ocp.checkpoint_utils.construct_restore_args(tree)
                args = ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True)
                arrays |= traverse_util.flatten_dict(checkpointer.restore(part, args=args))
        return arrays


def _saved_arrays(checkpointer: Any, folder: Path) -> dict[Path, dict[Name, Any]]:
    """Shape and dtype of every array in the checkpoint, by the folder of its part, read from Orbax's metadata."""
    parts = [folder.absolute() / STATE, *folder.absolute().glob(f"{FROZEN}*")]
    return {part: traverse_util.flatten_dict(checkpointer.metadata(part).item_metadata.tree) for part in parts}


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """`orbax.checkpoint` (imported here: it takes a third of a second) and a synchronous checkpointer.

    Without compression, which saves 8% on float32 weights and makes saving and restoring three times as slow. Where
    Orbax fails, its threads go on for a moment, and each logs an error of its own. These are silenced: the error that
    is raised says it.
    """
    import orbax.checkpoint as ocp

    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                with ocp.PyTreeCheckpointer(use_compression=False, use_zarr3=True) as checkpointer:
                    yield ocp, checkpointer
            except Exception as error:
                if not isinstance(error, BadInput):
                    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # futures complain when they are collected
                    time.sleep(0.5)
                raise
    finally:
        log.setLevel(level)
