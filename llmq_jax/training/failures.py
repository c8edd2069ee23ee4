"""How training fails: each failure is one line that says where, what, and from which checkpoint the run can go on.

How it is recognised that memory has run out, and what took it, is in out_of_memory.py. A signal is no failure: see
signals.py.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llmq_jax.atomic_files import full_disk
from llmq_jax.errors import BadInput
from llmq_jax.training.out_of_memory import OutOfMemory, shortage, usage
from llmq_jax.training.run_folder import has_trained


class NonFiniteLoss(BadInput):
    """Training broke down. The message names the step and the checkpoint to go on from."""


class DiskFull(BadInput):
    """There is no room for a checkpoint or a record. The message names the checkpoint to go on from."""


def require_finite(
    name: str, value: float, step: int, newest: Path | None, look_at: str = "the batch of this step"
) -> None:
    """NonFiniteLoss where this figure of a step is not finite. `newest` is the run's newest checkpoint, if it has
    one."""
    if not math.isfinite(value):
        raise non_finite(f"{name.replace('_', ' ')} is {value}", step, newest, look_at)


def require_finite_update(variables: Any, step: int, newest: Path | None) -> None:
    """NonFiniteLoss where a parameter is not finite after an update, which the step's own loss, computed before it,
    does not show."""
    if not all_finite(variables):
        raise non_finite("the update made parameters that are not finite", step, newest)


def non_finite(what: str, step: int, newest: Path | None, look_at: str = "the batch of this step") -> NonFiniteLoss:
    advice = f"lower the learning rate or look at {look_at}"
    return NonFiniteLoss(f"stopped at step {step}: {what}; {newest_text(newest, 'good checkpoint')}; {advice}")


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number of every array is finite."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in floating]))


def disk_full(error: Exception, place: str, newest: Path | None) -> DiskFull | None:
    """The error to raise for one that a full disk caused; None for any other, and for a BadInput, which says so
    itself."""
    why = full_disk(error)
    if why is None or isinstance(error, BadInput):
        return None
    saved = newest_text(newest, "good checkpoint")
    return DiskFull(f"stopped at {place}: {why}; {saved}; make room, and give the same command again")


def out_of_memory(
    error: Exception,
    place: str,
    newest: Path | None,
    folder: Path | None,
    state: Any,
    batch: Any,
    train_step: Callable[..., Any],
) -> OutOfMemory | None:
    """The error to raise for one that came of too little memory, with what a step needs; None for any other."""
    short = shortage(error)
    if short is None:
        return None
    # What could not be compiled is not tried again.
    needed = usage(state, batch, train_step, compiled="compil" not in str(error).lower())
    saved = newest_text(newest)
    if newest is None and folder is not None and has_trained(folder):
        saved += f", so remove {folder} before you run it with options that change results"
    return OutOfMemory(f"out of memory in {place} ({short}): {needed}; {saved}")


def newest_text(newest: Path | None, name: str = "checkpoint") -> str:
    return "no checkpoint was saved before it" if newest is None else f"the last {name} is {newest}"
