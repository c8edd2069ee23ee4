"""Checkpoints as former formats wrote them."""

import json

from llmq_jax.training.manifest import write_manifest


def save_in_format_2(checkpoints, step, state):
    """What no step changes was in `state/` then, with all else."""
    arrays = {name: getattr(state, name) for name in ("step", "variables", "optimizer_state", "key")}
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
