"""Checkpoints as former formats wrote them."""

import json
from unittest.mock import patch

from llmq_jax.training import checkpoints as module
from llmq_jax.training.manifest import write_manifest


def save_as_format_3_began(checkpoints, step, state):
    """What does not train was in one folder then, and what is carried in `state/`."""
    parts = module.parts_of(state.replace(carried=None))
    frozen = {name: array for part, arrays in parts.items() if part != "state" for name, array in arrays.items()}
    changing = {name: array for name, array in module.named_leaves(state).items() if name not in frozen}
    with patch.object(module, "parts_of", return_value={"state": changing, "frozen-0": frozen}):
        checkpoints.save(step, state)


def save_in_format_2(checkpoints, step, state):
    """What does not train was in `state/` then, with all else."""
    arrays = {name: getattr(state, name) for name in ("step", "variables", "optimizer_state", "key", "carried")}
    path = checkpoints.save(step, arrays)
    rewrite(path, json.loads((path / "checkpoint.json").read_text()) | {"version": 2})


def in_format_1(folder):
    """Rewrite a checkpoint as it was written before: under `validation_loss`, a reward with its sign turned."""
    info = json.loads((folder / "checkpoint.json").read_text())
    name, best, value = info.pop("judged_by"), info.pop("best"), info.pop("value")
    assert (name, best) in [("loss", "lowest"), ("reward", "highest")]
    loss = -value if best == "highest" and value is not None else value
    info |= {"validation_loss": loss, "version": 1}
    rewrite(folder, info)


def rewrite(folder, info):
    (folder / "checkpoint.json").write_text(json.dumps(info))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
