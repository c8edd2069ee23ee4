"""How a run gets its state: from the newest checkpoint in its own folder, if its options are still the same (resuming),
or from a checkpoint of another run, whose options may differ (branching)."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llmq_jax.atomic_files import json_bytes
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.field_types import check_fields
from llmq_jax.training import processes
from llmq_jax.training.checkpoints import (
    CheckpointInfo,
    Checkpoints,
    Restored,
    config_dict,
    find_checkpoint,
    read_config,
    read_info,
    restore_checkpoint,
)
from llmq_jax.training.manifest import CorruptCheckpoint
from llmq_jax.training.metrics import METRICS, read_metrics
from llmq_jax.training.plots import Point, curve, training_curve
from llmq_jax.training.report import RunResult
from llmq_jax.training.run_config import CODE, code_digest, differences
from llmq_jax.training.run_folder import FINISHED, RunFolder
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.state import with_updates
from llmq_jax.training.validation import LOSS, Validation


def open_folder(
    folder: str | Path,
    options: RunOptions,
    *,
    config: dict[str, Any] | None = None,
    may_change: Collection[str] = (),
    model_config: Any = None,
) -> RunFolder:
    """Open the folder of a run, for recipes that have work to do there before `run`, which takes the result in place of
    a path. Arguments are those of `run`. Options that it has not resolved are those of a run that evaluates and
    samples."""
    options = options.resolved(evaluates=True, samples=True, saves=True)
    described = {**(config or {}), "model": config_dict(model_config), "options": dataclasses.asdict(options)}
    described[CODE] = code_digest()
    may_change = [*may_change, CODE, *(f"options.{name}" for name in options.neutral)]
    return RunFolder(folder, described, may_change=may_change)


class Resumed(NamedTuple):
    state: Any
    info: CheckpointInfo
    loss: float | None
    """The training loss that was logged last."""
    reward: float | None
    """The reward that was logged last."""


def resume(
    folder: RunFolder,
    checkpoints: Checkpoints,
    state: Any,
    validation: Validation,
    learning_rates: np.ndarray | None,
    say: Callable[[str], None],
) -> Resumed | None:
    """The newest undamaged checkpoint in the place of `state`, whose arrays are freed; `validation` takes over the
    evaluations up to it. None where there is no checkpoint yet."""
    checkpoints.remove_leftovers()
    if processes.of_first(checkpoints.latest_step) is None:
        if folder.resumed:
            say(f"no checkpoint in {folder.path} yet: starting from the beginning")
        return None
    restored = checkpoints.restore(released(state), warn=say)
    assert restored is not None
    step = restored.info.step
    history = read_history(folder, step, validation.name)
    # The best checkpoint stays where metrics.jsonl, or its line there, is lost.
    judged = dict(processes.of_first(lambda: checkpoints.values(validation.judged_by))) | dict(history.judged)
    validation.take_up([(at, judged[at]) for at in sorted(judged) if at <= step], history.validation_losses)
    check_rates(folder, history.learning_rates, learning_rates)
    checkpoints.set_aside_after(step)
    say(f"resuming {folder.path} from step {step}")
    if processes.first() and folder.code_changed:
        say("the code has changed since this run began; results from here on may differ")
    return Resumed(*restored, history.loss, history.reward)


def finished_result(
    folder: RunFolder,
    checkpoints: Checkpoints,
    state: Any,
    validation: Validation,
    learning_rates: np.ndarray | None,
) -> RunResult:
    """The result of a run that was finished by an earlier process, with its last state in the place of `state`, never
    with that of an earlier step."""
    report = processes.of_first(folder.report)
    try:
        told = RunResult(state=None, **report)
        check_fields(told)
    except (TypeError, BadInput) as error:
        raise BadInput(f"{folder.path / FINISHED} is damaged ({error}); remove it and run the same again") from None
    history = History()
    with contextlib.suppress(BadInput):  # a finished run needs none of its records
        history = read_history(folder, told.step, validation.name)
    validation.take_up(history.judged, history.validation_losses)
    check_rates(folder, history.learning_rates, learning_rates)
    if not processes.of_first(lambda: told.step in checkpoints.steps()):
        return told
    try:
        restored = checkpoints.restore(released(state), told.step)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(
            f"{folder.path} is finished, but {error}; or remove {folder.path / FINISHED}, and the same "
            f"command goes on from the newest whole one"
        ) from None
    assert restored is not None
    return dataclasses.replace(told, state=restored.state)


class History(NamedTuple):
    """What metrics.jsonl has kept of a run."""

    loss: float | None = None
    """The training loss, as it was shown last."""
    reward: float | None = None
    """The reward in training, likewise."""
    judged: Sequence[Point] = ()
    validation_losses: Sequence[Point] = ()
    learning_rates: Sequence[Point] = ()


def read_history(folder: RunFolder, step: int, judged: str) -> History:
    """The figures up to a step, with those named `judged`. One process reads them for all, which must come to the same
    decisions."""

    def last(points: Sequence[Point]) -> float | None:
        return points[-1][1] if points else None

    def read() -> tuple[float | None, float | None, list[list[Point]]]:
        path = folder.path / METRICS
        records = [record for record in (read_metrics(path) if path.exists() else []) if record["step"] <= step]
        curves = [curve(records, name) for name in (judged, LOSS, "learning_rate")]
        return last(training_curve(records)), last(curve(records, "reward")), curves

    loss, reward, curves = processes.of_first(read)
    return History(loss, reward, *([(step, value) for step, value in points] for points in curves))


def check_rates(folder: RunFolder, recorded: Sequence[Point], learning_rates: np.ndarray | None) -> None:
    """BadInput where the recorded learning rates are not those of the schedule: a script may have changed it since it
    began the run, and not say so in `config`."""
    if learning_rates is None:
        return
    for step, rate in recorded:
        if step > len(learning_rates):
            steps = counted(len(learning_rates), "step")
            raise BadInput(f"{folder.path} holds a run with a step {step}, and this one has {steps}; give more")
        now = float(learning_rates[step - 1])
        if not math.isclose(rate, now, rel_tol=1e-4, abs_tol=1e-12):
            raise BadInput(
                f"{folder.path} holds a run with another learning rate: {rate:.6g} in step {step}, where it "
                f"would be {now:.6g}; give that schedule, or another folder"
            )


def branch(
    options: RunOptions,
    folder: RunFolder | None,
    state: Any,
    model_config: Any,
    updates_per_step: int | None,
    say: Callable[[str], None],
) -> Restored:
    """The checkpoint that `branch_from` names in the place of `state`, whose arrays are freed, with its updates counted
    as this run counts them, if it says how. It is the same one whenever the run in `folder` begins."""
    found = branch_source(options, folder)
    restored = restore_checkpoint(found, released(state))
    say(f"beginning with the state of {found}, after step {restored.info.step}")
    model = json.loads(json_bytes(config_dict(model_config)))
    if model and (differing := differences(read_config(found), model)):
        say(f"the model is configured otherwise than it was: {', '.join(differing)}")
    if updates_per_step is None:
        return restored
    return restored._replace(state=with_updates(restored.state, restored.info.step * updates_per_step))


def branch_source(options: RunOptions, folder: RunFolder | None = None) -> Path:
    """The checkpoint that `branch_from` names or, where the run in `folder` began before, named then. BadInput where
    there is none, or none that leaves steps to do."""

    def find() -> str:
        source = str(options.branch_from)
        kept = None if folder is None else folder.branched_from(source)
        found = find_checkpoint(source if kept is None else kept)
        if found is None and kept is not None:
            assert folder is not None
            raise BadInput(f"{folder.path} began with {kept}, which is gone; begin anew in another folder")
        if found is None:
            raise BadInput(f"branch_from is {source}, where no checkpoint is; name one, or the folder of a run")
        step = read_info(found).step
        if step >= options.steps:
            raise BadInput(
                f"branch_from is {found}, the state after step {step}, and steps is {options.steps}, which counts from "
                "the other run's beginning; give more"
            )
        if folder is not None and kept is None:
            folder.keep_branch(str(found))
        return str(found)

    return Path(processes.of_first(find))


def released(state: Any) -> Any:
    """The shapes and shardings of a state, whose arrays are freed: what is restored in its place then need not fit
    beside it."""

    def described(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    example = jax.tree.map(described, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return example
