import errno
import io
import os
import signal
from dataclasses import replace

import jax
import pytest

from llmq_jax.training import engine
from llmq_jax.training.checkpoints import Checkpoints
from llmq_jax.training.failures import DiskFull, NonFiniteLoss
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.run_options import RunOptions
from tests.training import tiny_run
from tests.training.compared_runs import assert_same_run, broken_at, quiet
from tests.training.tiny_run import OPTIONS, STEPS, Batches


class Poisoned(Batches):
    """A mask of zeros from `step` on: the loss is 0 / 0."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def __getitem__(self, step):
        batch = super().__getitem__(step)
        return {**batch, "mask": batch["mask"] * 0} if step >= self.step else batch


@pytest.mark.parametrize(("bad", "last_good"), [(7, 4), (8, 4), (20, 16)])
def test_loss_that_is_not_finite_stops_the_run(bad, last_good, tmp_path):
    folder = tmp_path / "run"
    match = rf"stopped at step {bad}: loss is nan; the last good checkpoint is .*{last_good:08d}"
    with pytest.raises(NonFiniteLoss, match=match) as error:
        quiet(folder, Poisoned(bad - 1))
    assert "\n" not in str(error.value)
    assert Checkpoints(folder / "checkpoints").latest_step() == last_good
    assert not (folder / "finished.json").exists()
    assert all(record["step"] < bad for record in read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize("under_way", [True, False])
@pytest.mark.parametrize("fails", ["batch", "step"])
def test_steps_are_recorded_before_an_error_leaves(fails, under_way, tmp_path, monkeypatch):
    def step(state, batch):
        if state.step == 6:
            raise RuntimeError("no batch 6")
        return tiny_run.train_step(state, batch)

    monkeypatch.setattr(engine, "is_under_way", lambda loss: under_way)
    batches, step = (Batches(broken_at(6)), tiny_run.train_step) if fails == "batch" else (Batches(), step)
    options = RunOptions(steps=STEPS, log_every=1, checkpoint_every=0)
    with pytest.raises(RuntimeError, match="no batch 6"):
        engine.run(tiny_run.new_state(), step, batches, options, folder=tmp_path, output=io.StringIO())
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_validation_loss_must_be_finite_too(tmp_path):
    losses = iter([1.0, float("nan")])
    with pytest.raises(NonFiniteLoss, match=r"step 8: validation loss is nan; the last good checkpoint is .*00000004"):
        quiet(tmp_path / "run", evaluate=lambda variables: {"loss": next(losses)})
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "validation_loss" in r] == [4]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert Checkpoints(tmp_path / "run/checkpoints").latest_step() == 4


def test_a_sample_that_fails_costs_no_training(whole, tmp_path):
    def failing(variables, step):
        raise RuntimeError(f"no sample at {step}")

    folder = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no sample at 8"):
            quiet(folder, sample=failing)
        assert Checkpoints(folder / "checkpoints").latest_step() == 8
    quiet(folder)
    assert_same_run(whole, folder)


def test_what_a_run_is_judged_by_must_be_finite(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 4: validation reward is nan; no checkpoint"):
        quiet(tmp_path / "run", evaluate=lambda variables: {"reward": float("nan")}, judged_by=("reward", "highest"))


def test_gradient_and_parameters_must_be_finite_too(tmp_path):
    def break_gradient(state, batch):
        state, metrics = tiny_run.train_step(state, batch)
        return state, {**metrics, "grad_norm": metrics["grad_norm"] / (state.step != 3)}

    def break_update(state, batch):
        state, metrics = tiny_run.train_step(state, batch)
        return state.replace(variables=jax.tree.map(lambda x: x / (state.step != 8), state.variables)), metrics

    for step, message in ((break_gradient, "step 3: grad norm is inf"), (break_update, "step 8: the update made")):
        folder = tmp_path / step.__name__
        with pytest.raises(NonFiniteLoss, match=message):
            options = replace(OPTIONS, evaluate_every=0, sample_every=0)
            engine.run(tiny_run.new_state(), step, Batches(), options, folder=folder, output=io.StringIO())
        assert Checkpoints(folder / "checkpoints").latest_step() in (None, 4)


def test_what_a_run_begins_from_must_be_finite_too(tmp_path):
    with pytest.raises(NonFiniteLoss, match="stopped at step 0: validation loss is nan; no checkpoint was saved"):
        quiet(
            tmp_path / "run",
            options=replace(OPTIONS, evaluate_first=True),
            evaluate=lambda variables: {"loss": float("nan")},
        )


def full_at(monkeypatch, *steps):
    """There is no room for the checkpoints of these steps."""
    save = Checkpoints.save

    def saving(checkpoints, step, *arguments, **named):
        if step in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(checkpoints, step, *arguments, **named)

    monkeypatch.setattr(Checkpoints, "save", saving)


def test_a_full_disk_stops_the_run_which_goes_on_once_there_is_room(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        full_at(patched, 8)
        with pytest.raises(DiskFull) as error:
            tiny_run.run(folder)
    assert str(error.value) == (
        f"stopped at the checkpoints of step 8: No space left on device; the last good checkpoint is "
        f"{folder}/checkpoints/00000004; make room, and give the same command again"
    )
    tiny_run.run(folder)
    assert_same_run(folder, whole)


def test_a_run_may_go_on_without_a_checkpoint_but_for_the_last_and_where_it_is_stopped(whole, tmp_path, monkeypatch):
    going_on = replace(OPTIONS, on_full_disk="continue")
    output = io.StringIO()
    full_at(monkeypatch, 4, 12)
    tiny_run.run(tmp_path / "run", options=going_on, output=output)
    warnings = [line for line in output.getvalue().splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: step 4: checkpoint not saved: No space left on device; no checkpoint was saved before it; going on",
        f"warning: step 12: checkpoint not saved: No space left on device; the last good checkpoint is "
        f"{tmp_path}/run/checkpoints/00000008; going on",
    ]
    assert_same_run(tmp_path / "run", whole)
    full_at(monkeypatch, 6, STEPS)
    stopping = Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None)
    with pytest.raises(DiskFull, match="checkpoints of step 6: No space left on device"):  # and not: which is saved
        tiny_run.run(tmp_path / "last", stopping, going_on)
    with pytest.raises(DiskFull, match=f"checkpoints of step {STEPS}: No space left on device; the last good .*16; "):
        tiny_run.run(tmp_path / "last", options=going_on)
    assert not (tmp_path / "last" / "finished.json").exists()
