import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from old_checkpoints import in_format_1
from tiny_run import OPTIONS, PATIENT, STEPS, Batches

from llmq_jax.data.batching import count_tokens
from llmq_jax.errors import BadInput
from llmq_jax.training import engine
from llmq_jax.training.checkpoints import Checkpoints, load_checkpoint_variables
from llmq_jax.training.failures import DiskFull, NonFiniteLoss
from llmq_jax.training.metrics import TIME_FIELDS, read_metrics
from llmq_jax.training.run_folder import RunFolder
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.signals import StoppedBySignal


def timeless(folder):
    """The records of a run without what may differ between equal runs."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIME_FIELDS} for record in records]


def state_at(folder, step):
    return Checkpoints(folder / "checkpoints").restore(tiny_run.new_state(), step).state


def final_state(folder):
    return state_at(folder, json.loads((folder / "finished.json").read_text())["step"])


def assert_same_run(one, other):
    assert timeless(one) == timeless(other)
    assert (one / "samples.txt").read_bytes() == (other / "samples.txt").read_bytes()
    assert_same_arrays(final_state(one), final_state(other))
    assert Checkpoints(one / "checkpoints").steps() == Checkpoints(other / "checkpoints").steps()


def assert_same_arrays(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def quiet(folder, *arguments, **named):
    output = io.StringIO()
    result = tiny_run.run(folder, *arguments, output=output, **named)
    return result, output.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    quiet(folder)
    return folder


@pytest.mark.exhaustive
def test_killed_at_every_kind_of_point_and_run_again_is_the_same_run(whole, tmp_path):
    folder = tmp_path / "killed"
    script = [sys.executable, tiny_run.__file__, str(folder)]
    for kill in (
        "step:3",  # before the first checkpoint
        "torn:6",  # in the middle of a line of metrics.jsonl
        "arrays:8",  # in a checkpoint: arrays written, no manifest
        "manifest:8",  # manifest written, not renamed
        "committed:8",
        "orbax:12",  # 30 ms into a checkpoint
        "deletion:12",  # in the middle of deleting an old checkpoint
        "committed:20",  # the last one, before an older one is deleted
        "plot",  # after the last checkpoint, before the run is marked as finished
    ):
        done = subprocess.run([*script, kill], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (kill, done.stdout, done.stderr)
    assert not (folder / "finished.json").exists()
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "from step 20" in done.stdout
    assert_same_run(whole, folder)
    assert json.loads((folder / "finished.json").read_text())["step"] == STEPS
    assert not [name for name in os.listdir(folder / "checkpoints") if not name.isdigit()]


def test_records_are_complete_and_right(whole):
    records = timeless(whole)
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [1, *range(2, STEPS + 1, 2)]
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8, 12, 16, 20]
    assert list(training[0]) == ["step", "tokens", "loss", "learning_rate", "grad_norm"]
    # Against a plain loop.
    state, tokens, losses = tiny_run.new_state(), 0, []
    for step in range(STEPS):
        batch = Batches()[step]
        state, metrics = tiny_run.train_step(state, batch)
        tokens += int(batch["mask"].sum())
        losses.append(float(metrics["loss"]))
    assert [record["loss"] for record in training] == [losses[record["step"] - 1] for record in training]
    assert training[-1]["tokens"] == tokens
    rates = [float(tiny_run.SCHEDULE(record["step"] - 1)) for record in training]
    np.testing.assert_allclose([record["learning_rate"] for record in training], rates, rtol=1e-6)
    assert_same_arrays(final_state(whole), state)


def test_run_leaves_its_files_and_a_checkpoint_to_load(whole):
    assert {"config.json", "metrics.jsonl", "samples.txt", "losses.png", "finished.json"} <= set(os.listdir(whole))
    assert len(Checkpoints(whole / "checkpoints").steps()) in (2, 3)
    loaded = load_checkpoint_variables(whole)
    assert (loaded.config, loaded.info.step) == ({"width": 8}, STEPS)
    assert loaded.info.value == [r for r in timeless(whole) if "validation_loss" in r][-1]["validation_loss"]


def test_finished_run_says_so_and_returns_its_result(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*")}
    result, said = quiet(whole, Batches(lambda step: pytest.fail("trained again")))
    assert "is finished already; nothing to do" in said
    assert (result.step, result.best_step is not None) == (STEPS, True)
    assert_same_arrays(result.state, final_state(whole))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.*") if path.name != "run.lock"} == {
        path: time for path, time in before.items() if path.name != "run.lock"
    }


def test_another_schedule_is_another_run(whole, tmp_path):
    """Whether it was stopped or is finished: a script that changes its rate alone would be given the old result."""
    faster = tiny_run.optax.linear_schedule(0.1, 0.0, STEPS)
    with pytest.raises(BadInput, match=r"another learning rate: 0\.05 in step 1, where it would be 0\.1; give that"):
        quiet(whole, schedule=faster)
    stopping = Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None)
    with pytest.raises(StoppedBySignal):
        quiet(tmp_path / "run", stopping)
    with pytest.raises(BadInput, match="holds a run with another learning rate"):
        quiet(tmp_path / "run", schedule=faster)
    quiet(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits(number, whole, tmp_path):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    output = io.StringIO()
    batches = Batches(lambda step: os.kill(os.getpid(), number) if step == 6 else None)
    with pytest.raises(StoppedBySignal) as stopped:
        tiny_run.run(tmp_path / "run", batches, output=output)
    assert stopped.value.code == 128 + number
    assert f"stopped by {number.name} after step 6" in output.getvalue()
    assert Checkpoints(tmp_path / "run/checkpoints").latest_step() == 6
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    quiet(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_signals_act_as_usual_where_nothing_would_be_saved(tmp_path):
    batches = Batches(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        quiet(tmp_path / "run", batches, replace(OPTIONS, checkpoint_every=0))


def test_damaged_newest_checkpoint_is_named_and_passed_over(whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(StoppedBySignal):
        quiet(folder, Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 10 else None))
    flip_a_bit(folder / "checkpoints" / "00000010")
    _, said = quiet(folder)
    warning, following = said.splitlines()[:2]
    assert warning.startswith("warning: checkpoint") and "00000010 is damaged" in warning
    assert following.endswith("from step 8")
    assert (folder / "checkpoints" / "damaged-00000010").is_dir()
    assert_same_run(whole, folder)


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(StoppedBySignal):
        quiet(folder, Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None))
    flip_a_bit(folder / "checkpoints" / "00000002")
    metrics = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match=r"no checkpoint in .* is whole"):
        quiet(folder)
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def flip_a_bit(checkpoint):
    largest = max((path for path in checkpoint.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


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


def test_validation_loss_must_be_finite_too(tmp_path):
    losses = iter([1.0, float("nan")])
    with pytest.raises(NonFiniteLoss, match=r"step 8: validation loss is nan; the last good checkpoint is .*00000004"):
        quiet(tmp_path / "run", evaluate=lambda variables: {"loss": next(losses)})
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "validation_loss" in r] == [4]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert Checkpoints(tmp_path / "run/checkpoints").latest_step() == 4


def broken_at(bad):
    """For Batches: an error in the place of this batch."""

    def before(step):
        if step == bad:
            raise RuntimeError(f"no batch {bad}")

    return before


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


def test_a_torn_sample_of_the_checkpoints_step_is_written_anew(whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(9)))
    samples = (folder / "samples.txt").read_text()
    assert samples.startswith("step 8\n")
    (folder / "samples.txt").write_text(samples[:14])
    quiet(folder)
    assert_same_run(whole, folder)


def new_bests_at(*steps):
    """An evaluate function for OPTIONS: the loss falls at these steps, and is higher at all others."""
    losses = {step: 1 / step if step in steps else 2.0 for step in range(4, STEPS + 1, 4)}

    def evaluate(variables):
        evaluate.calls += 1
        return {"loss": losses[4 * evaluate.calls]}

    evaluate.calls = 0
    return evaluate


def test_a_new_best_is_saved_though_no_checkpoint_is_due(tmp_path):
    options = replace(OPTIONS, checkpoint_every=10, keep_last=1)
    quiet(tmp_path / "best", options=options, evaluate=new_bests_at(4, 8))
    checkpoints = Checkpoints(tmp_path / "best/checkpoints")
    assert (checkpoints.steps(), checkpoints.best_step()) == ([8, 20], 8)
    assert load_checkpoint_variables(checkpoints.path(8)).info.value == 1 / 8
    for name, changed in (("unwanted", {"keep_best": False}), ("never", {"checkpoint_every": 0})):
        quiet(tmp_path / name, options=replace(options, **changed), evaluate=new_bests_at(4, 8))
        assert Checkpoints(tmp_path / name / "checkpoints").steps() == ([20] if name == "unwanted" else [])
        assert timeless(tmp_path / name) == timeless(tmp_path / "best")


def test_saving_new_bests_changes_nothing_else_and_resumes_exactly(whole, tmp_path):
    folder, options = tmp_path / "run", replace(OPTIONS, checkpoint_every=STEPS)
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(11)), options)
    assert Checkpoints(folder / "checkpoints").latest_step() in (4, 8)
    _, said = quiet(folder, options=options)
    assert "resuming" in said
    assert_same_run(whole, folder)


REWARDS = {4: 0.2, 8: 0.9, 12: 0.9, 16: 0.5, 20: 0.1}
REWARDED = {"judged_by": ("reward", "highest"), "options": replace(OPTIONS, checkpoint_every=10, keep_last=1)}


def rewarding(begin=0):
    """An evaluate function for OPTIONS, of a process that begins after step `begin`."""
    steps = iter(range(begin + 4, STEPS + 1, 4))
    return lambda variables: {"reward": REWARDS[next(steps)]}


def test_a_run_may_be_judged_by_a_figure_whose_highest_value_is_the_best(tmp_path):
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(13)), evaluate=rewarding(), **REWARDED)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([8, 10], 8)
    result, said = quiet(folder, evaluate=rewarding(begin=8), **REWARDED)
    assert "from step 10" in said
    assert (checkpoints.steps(), checkpoints.best_step()) == ([8, 20], 8)
    info = load_checkpoint_variables(checkpoints.path(8)).info
    assert (info.judged_by, info.best, info.value) == ("reward", "highest", 0.9)
    assert (result.best_step, result.validation_loss, result.best_validation_loss) == (8, None, None)
    assert json.loads((folder / "finished.json").read_text())["best_step"] == 8
    assert "\nbest: validation reward 0.9000 at step 8\n" in said
    assert "\nbest: validation reward 0.9000 at step 8\n" in quiet(folder, **REWARDED)[1]  # which is finished


def test_a_run_of_checkpoints_of_format_1_goes_on_to_the_same_best(tmp_path):
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(13)), evaluate=rewarding(), **REWARDED)
    for step in checkpoints.steps():
        in_format_1(checkpoints.path(step))
    result, said = quiet(folder, evaluate=rewarding(begin=8), **REWARDED)
    assert "from step 10" in said
    assert (result.best_step, checkpoints.steps(), checkpoints.best_step()) == (8, [8, 20], 8)


def test_a_run_from_before_it_was_judged_goes_on(tmp_path):
    """As GRPO's: its checkpoints know nothing of rewards, its metrics do."""
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    options = replace(OPTIONS, keep_last=9)
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(5)), options, evaluate=rewarding())
    config = json.loads((folder / "config.json").read_text())
    del config["options"]["patience"]  # which it did not know of
    (folder / "config.json").write_text(json.dumps(config))
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (4, None)
    named = {**REWARDED, "options": options}
    result, _ = quiet(folder, evaluate=rewarding(begin=4), **named)
    assert (result.best_step, checkpoints.best_step()) == (8, 8)


def test_the_validation_loss_is_told_beside_what_a_run_is_judged_by(tmp_path):
    both = rewarding()
    options = {**REWARDED, "evaluate": lambda variables: {"loss": 2.0, **both(variables)}}
    result, said = quiet(tmp_path / "run", **options)
    assert (result.best_step, result.validation_loss, result.best_validation_loss) == (8, 2.0, None)
    assert "validation loss 2.0000\n" in said and "\nbest: validation reward 0.9000 at step 8\n" in said
    assert json.loads((tmp_path / "run/finished.json").read_text())["validation_loss"] == 2.0


def test_a_new_best_is_what_no_checkpoint_is_as_good_as(tmp_path):
    """Where that of the best step has gone, the next one that is better than those left stays."""
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    named = {"judged_by": ("reward", "highest"), "options": replace(OPTIONS, checkpoint_every=10, keep_last=1)}
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(11)), evaluate=rewarding(), **named)
    shutil.rmtree(checkpoints.path(8))
    quiet(folder, evaluate=rewarding(begin=8), **named)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([12, 20], 12)


def test_a_finished_run_needs_none_of_its_records(tmp_path):
    quiet(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("{torn\n" * 3)
    assert "is finished already; nothing to do" in quiet(tmp_path / "run")[1]


def test_an_early_end_is_logged_whatever_the_interval(tmp_path):
    options = replace(PATIENT, log_every=9)
    result, _ = quiet(tmp_path / "run", options=options, evaluate=tiny_run.turning)
    records = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in record]
    assert (records[-1]["step"], records[-1]["loss"]) == (14, pytest.approx(result.loss))


def test_what_a_run_is_judged_by_must_be_finite(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 4: validation reward is nan; no checkpoint"):
        quiet(tmp_path / "run", evaluate=lambda variables: {"reward": float("nan")}, judged_by=("reward", "highest"))


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """The folder of an uninterrupted run that stops early, and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "impatient"
    return folder, quiet(folder, options=PATIENT, evaluate=tiny_run.turning)[1]


STOPPED = (
    "stopped early after step 14: 4 evaluations in a row without a new best; best: validation loss 0.0073 at step 6"
)


def test_a_run_stops_after_evaluations_without_a_new_best_as_at_its_end(impatient, tmp_path):
    folder, said = impatient
    assert STOPPED in said.splitlines()
    assert "finished: 14 steps" in said and "(best 0.0073 at step 6)" in said
    finished = json.loads((folder / "finished.json").read_text())
    assert (finished["step"], finished["best_step"]) == (14, 6)
    assert Checkpoints(folder / "checkpoints").steps() == [6, 12, 14]
    assert (folder / "samples.txt").read_text().count("step 14\n") == 2  # a heading, and what stands below it
    assert timeless(folder)[-1]["step"] == 14
    assert "finished after 14 steps" in (folder / "report.html").read_text()
    assert "is finished already" in quiet(folder, options=PATIENT, evaluate=tiny_run.turning)[1]
    # Up to there it is the run that goes on.
    longer = replace(PATIENT, patience=None, checkpoint_every=2, keep_last=STEPS)
    quiet(tmp_path / "run", options=longer, evaluate=tiny_run.turning)
    assert_same_arrays(final_state(folder), state_at(tmp_path / "run", 14))


@pytest.mark.parametrize("bad", [5, 7, 13])
def test_patience_counts_the_evaluations_before_an_interruption(impatient, tmp_path, bad):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(bad)), PATIENT, evaluate=tiny_run.turning)
    _, said = quiet(folder, options=PATIENT, evaluate=tiny_run.turning)
    assert "resuming" in said and STOPPED in said
    assert_same_run(impatient[0], folder)


def test_a_run_that_broke_off_at_its_early_end_comes_to_it(impatient, tmp_path):
    """After the last checkpoint: the sample that is due then is written, no step is taken."""

    def failing(variables, step):
        if step == 14:
            raise RuntimeError("no sample")
        return tiny_run.sample(variables, step)

    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no sample"):
        quiet(folder, options=PATIENT, evaluate=tiny_run.turning, sample=failing)
    batches = Batches(lambda step: pytest.fail("trained further"))
    _, said = quiet(folder, batches, PATIENT, evaluate=lambda variables: pytest.fail("evaluated again"))
    assert "from step 14" in said and STOPPED in said
    assert_same_run(impatient[0], folder)


@pytest.mark.exhaustive
def test_killed_at_every_kind_of_point_a_run_stops_early_at_the_same_step(impatient, tmp_path):
    folder = tmp_path / "killed"
    script = [sys.executable, tiny_run.__file__, str(folder), "patient"]
    for kill in ("step:7", "torn:10", "manifest:12", "step:13", "manifest:14", "committed:14", "plot"):
        done = subprocess.run([*script, kill], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (kill, done.stdout, done.stderr)
    done = subprocess.run(script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "from step 14" in done.stdout and STOPPED in done.stdout
    assert_same_run(impatient[0], folder)


def test_a_run_that_comes_to_its_last_step_does_not_stop_early(tmp_path):
    for patience, steps in ((7, STEPS), (6, 18)):
        options = replace(PATIENT, patience=patience)
        result, said = quiet(tmp_path / str(patience), options=options, evaluate=tiny_run.turning)
        assert (result.step, "stopped early" in said) == (steps, steps < STEPS)


def test_one_evaluation_may_be_patience_enough_and_needs_no_folder():
    options = replace(PATIENT, patience=1, checkpoint_every=None)
    result, said = quiet(None, options=options, evaluate=tiny_run.turning)
    assert result.step == 8
    assert "stopped early after step 8: 1 evaluation without a new best; best: validation loss 0.0073 at step 6" in said


def test_a_signal_in_the_step_of_an_early_stop_lets_the_run_end(impatient, tmp_path):
    batches = Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 14 else None)
    quiet(tmp_path / "run", batches, PATIENT, evaluate=tiny_run.turning)
    assert_same_run(impatient[0], tmp_path / "run")


def test_patience_without_anything_to_wait_for_is_refused(tmp_path):
    for options, evaluate in ((replace(PATIENT, evaluate_every=0), tiny_run.evaluate), (PATIENT, None)):
        options = options if evaluate else replace(options, evaluate_every=None)
        with pytest.raises(
            BadInput, match="patience is 4, but the run has no evaluations; give it some or leave it out"
        ):
            quiet(tmp_path / "run", options=options, evaluate=evaluate)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="patience is 4, but evaluate returns no loss to judge the run by"):
        quiet(tmp_path / "run", options=PATIENT, evaluate=lambda variables: {"accuracy": 0.5})


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


def test_device_is_never_waited_for_before_the_next_step_is_handed_over(tmp_path):
    """What is read of step s must come after the call of step s + 1, save where the run pauses."""
    order = []

    def step(state, batch):
        order.append(("step", int(state.step) + 1))
        state, metrics = tiny_run.train_step(state, batch)
        return state, metrics

    read = engine._Loop.read
    engine._Loop.read = lambda self, done: (order.append(("read", done.step)), read(self, done))
    try:
        options = RunOptions(steps=4)
        engine.run(tiny_run.new_state(), step, Batches(), options, output=io.StringIO())
    finally:
        engine._Loop.read = read
    assert order == [
        ("step", 1),
        ("step", 2),
        ("read", 1),
        ("step", 3),
        ("read", 2),
        ("step", 4),
        ("read", 3),
        ("read", 4),
    ]


def test_a_tokenizer_that_cannot_be_saved_is_told_before_the_first_step(tmp_path):
    class Gap:
        def save(self, folder):
            raise BadInput("the id of '<pad>' leaves a gap")

    with pytest.raises(BadInput, match="leaves a gap"):
        quiet(tmp_path / "run", tokenizer=Gap())
    assert not (tmp_path / "run").exists()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, said = quiet(None, options=RunOptions(steps=STEPS))
    assert result.step == STEPS and result.best_validation_loss <= result.validation_loss
    assert said.count("validation loss") == 11  # ten times, and in the report
    assert os.listdir(tmp_path) == []


def test_finished_run_never_shows_the_state_of_an_earlier_step(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    flip_a_bit(folder / "checkpoints" / "00000020")
    with pytest.raises(BadInput, match=r"run is finished, but checkpoint .*00000020 is damaged.*finished\.json"):
        quiet(folder)
    (folder / "finished.json").unlink()  # as the message says
    quiet(folder)
    assert_same_run(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "00000020")
    result, said = quiet(folder)
    assert "is finished already" in said and (result.state, result.step) == (None, STEPS)


def test_run_folder_of_the_caller_is_used_and_stays_locked(whole, tmp_path):
    with RunFolder(tmp_path / "run", {"lr": 1}) as folder:
        quiet(folder)
        with pytest.raises(BadInput, match="another process"):
            RunFolder(tmp_path / "run", {"lr": 1})
        with pytest.raises(BadInput, match="config has no effect"):
            quiet(folder, config={"lr": 2})
    assert_same_run(whole, tmp_path / "run")


def test_another_run_is_refused_and_neutral_options_may_change(whole):
    with pytest.raises(BadInput, match=r"options.log_every 2 -> 5;"):
        quiet(whole, options=replace(OPTIONS, log_every=5))
    with pytest.raises(BadInput, match=r"model.width 8 -> 9;"):
        quiet(whole, model_config={"width": 9})
    quiet(whole, options=replace(OPTIONS, keep_last=7, plot=False, sample_every=3, evaluate_every=5))


def branching(source, **changed):
    return replace(OPTIONS, branch_from=str(source), **changed)


def test_a_branch_of_a_run_goes_on_from_its_whole_state(whole, tmp_path):
    """With equal options it is that run: dropout's key, the moments and the place in the data come along. Killed before
    its first checkpoint it branches off once more, and after it goes on from its own."""
    source, folder = tmp_path / "stopped", tmp_path / "branch"
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(source, Batches(broken_at(9)))
    for broken in (10, 14):
        with pytest.raises(RuntimeError, match="no batch"):
            quiet(folder, Batches(broken_at(broken)), branching(source))
    shutil.rmtree(source)  # which it needs no more
    result, said = quiet(folder, options=branching(source))
    assert "from step 12" in said
    assert_same_arrays(result.state, final_state(whole))
    assert timeless(folder) == [record for record in timeless(whole) if record["step"] > 8]
    assert result.tokens == timeless(whole)[-1]["tokens"]


def test_a_branch_may_differ_in_all_but_its_arrays(whole, tmp_path):
    at_16 = whole / "checkpoints" / "00000016"
    said = quiet(tmp_path / "longer", options=branching(at_16, steps=24), model_config={"width": 8, "depth": 2})[1]
    assert f"beginning with the state of {at_16}, after step 16" in said
    assert "the model is configured otherwise than it was: depth (not set) -> 2" in said
    slow = tiny_run.optax.linear_schedule(1e-3, 0.0, 24)
    result, _ = quiet(tmp_path / "slow", options=branching(at_16, steps=24), schedule=slow)
    assert (result.step, [r["step"] for r in timeless(tmp_path / "slow") if "loss" in r]) == (24, [18, 20, 22, 24])
    result, _ = quiet(None, options=branching(at_16, checkpoint_every=0))
    assert_same_arrays(result.state, final_state(whole))


@pytest.mark.parametrize(
    ("source", "changed", "message"),
    [
        ("nothing", {}, "branch_from is .*nothing, where no checkpoint is; name one, or the folder of a run"),
        ("", {}, "00000020, the state after step 20, and steps is 20, which counts from the other run's beginning"),
    ],
)
def test_what_no_run_can_branch_off_is_refused(source, changed, message, whole, tmp_path):
    with pytest.raises(BadInput, match=message):
        quiet(tmp_path / "branch", options=branching(whole / source, **changed))
    assert not (tmp_path / "branch").exists()


def test_a_resumed_run_holds_one_state(whole, tmp_path):
    """The one that it was given makes room for the one on the disk."""
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(9)))
    given = tiny_run.new_state()
    arguments = {"schedule": tiny_run.SCHEDULE, "evaluate": tiny_run.evaluate, "sample": tiny_run.sample}
    arguments |= {"model_config": {"width": tiny_run.WIDTH}, "output": io.StringIO()}
    result = engine.run(given, tiny_run.train_step, Batches(), OPTIONS, folder=folder, **arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert_same_arrays(result.state, final_state(whole))


def test_evaluations_may_come_at_other_steps_when_a_run_goes_on(whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(9)))
    result, _ = quiet(folder, options=replace(OPTIONS, evaluate_every=7))
    records = timeless(folder)
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8, 14, 20]
    training = [record for record in records if "loss" in record]
    assert training == [record for record in timeless(whole) if "loss" in record]
    assert_same_arrays(final_state(folder), final_state(whole))
    assert result.best_step == STEPS


FIRST = replace(OPTIONS, evaluate_first=True)


def test_what_a_run_begins_from_is_evaluated_and_changes_nothing_else(whole, tmp_path):
    _, said = quiet(tmp_path / "run", options=FIRST)
    first, *others = timeless(tmp_path / "run")
    began = tiny_run.evaluate(tiny_run.new_state().variables)["loss"]
    assert first == {"step": 0, "tokens": 0, "validation_loss": began}
    assert said.splitlines()[0] == f"step 0: validation loss {began:.4f}"
    assert others == timeless(whole)
    assert_same_arrays(final_state(tmp_path / "run"), final_state(whole))


def test_a_run_that_goes_on_was_evaluated_at_its_beginning_already(tmp_path):
    quiet(tmp_path / "whole", options=FIRST)
    for bad in (2, 9):  # before and after the first checkpoint
        with pytest.raises(RuntimeError, match="no batch"):
            quiet(tmp_path / "run", Batches(broken_at(bad)), FIRST)
    _, said = quiet(tmp_path / "run", options=FIRST)
    assert "from step 8" in said and "step 0:" not in said
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_from_before_it_was_evaluated_first_goes_on(whole, tmp_path):
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(tmp_path / "run", Batches(broken_at(9)))
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["options"]["evaluate_first"]  # which it did not know of
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    _, said = quiet(tmp_path / "run", options=FIRST)
    assert "from step 8" in said and "step 0:" not in said
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("bad", [None, 13])
def test_what_a_run_begins_from_is_neither_the_best_step_nor_waited_for(tmp_path, bad):
    """Though it is better than all that follow; of a run that was interrupted, too."""
    losses = {0: 0.1, 4: 0.5, 8: 0.4, 12: 0.6, 16: 0.7, 20: 0.8}
    options = replace(FIRST, patience=2)

    def falling(begin):
        steps = iter(step for step in losses if step >= begin)
        return lambda variables: {"loss": losses[next(steps)]}

    if bad is not None:
        with pytest.raises(RuntimeError, match="no batch"):
            quiet(tmp_path / "run", Batches(broken_at(bad)), options, evaluate=falling(0))
    result, said = quiet(tmp_path / "run", options=options, evaluate=falling(16 if bad else 0))
    assert (
        "stopped early after step 16: 2 evaluations in a row without a new best; best: validation loss 0.4000" in said
    )
    assert (result.step, result.best_step, result.best_validation_loss) == (16, 8, 0.4)
    assert Checkpoints(tmp_path / "run/checkpoints").best_step() == 8


def test_what_a_run_begins_from_must_be_finite_too(tmp_path):
    with pytest.raises(NonFiniteLoss, match="stopped at step 0: validation loss is nan; no checkpoint was saved"):
        quiet(tmp_path / "run", options=FIRST, evaluate=lambda variables: {"loss": float("nan")})


def test_an_evaluation_at_first_is_refused_where_a_run_has_none(tmp_path):
    for evaluate, every in ((None, None), (tiny_run.evaluate, 0)):
        with pytest.raises(BadInput, match="evaluate_first is asked for, but the run has no evaluations; give it some"):
            quiet(tmp_path / "run", options=replace(FIRST, evaluate_every=every), evaluate=evaluate)


def test_what_decides_where_a_run_ends_must_stay(impatient):
    folder, _ = impatient
    for changed, said in (
        ({"patience": 5}, r"options.patience 4 -> 5;"),
        ({"patience": None}, r"options.patience 4 -> null;"),
        ({"evaluate_every": 3}, r"options.evaluate_every 2 -> 3;"),
    ):
        with pytest.raises(BadInput, match=said):
            quiet(folder, options=replace(PATIENT, **changed), evaluate=tiny_run.turning)


def test_patience_cannot_begin_in_the_middle_of_a_run(whole):
    with pytest.raises(BadInput, match=r"options.patience null -> 2;"):
        quiet(whole, options=replace(OPTIONS, patience=2))


@pytest.mark.parametrize("name", ["evaluate_every", "sample_every", "checkpoint_every"])
def test_interval_that_would_do_nothing_is_refused(name):
    with pytest.raises(BadInput, match=f"{name} is 5, but the run has no"):
        tiny_run.run(None, options=RunOptions(**{"steps": 20, name: 5}), evaluate=None, sample=None)


def test_evaluation_may_know_other_figures_than_a_loss(tmp_path):
    options = RunOptions(steps=2, evaluate_every=2, tensorboard=False, plot=False)
    result, _ = quiet(tmp_path / "run", options=options, evaluate=lambda variables: {"accuracy": np.float32(0.5)})
    assert (result.validation_loss, result.best_step) == (None, None)
    assert timeless(tmp_path / "run")[-1] == {"step": 2, "tokens": result.tokens, "validation_accuracy": 0.5}
    assert Checkpoints(tmp_path / "run/checkpoints").best_step() is None


def test_zero_means_never(tmp_path):
    options = replace(OPTIONS, log_every=0, evaluate_every=0, sample_every=0, checkpoint_every=0)
    _, said = quiet(tmp_path / "run", options=options)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "step 4:" not in said  # while "step 4%" of the time may well be


def test_a_run_without_any_loss_to_draw_ends_too(tmp_path):
    """As GRPO's does, whose evaluation has a reward and no loss, with --log-every 0."""
    options = replace(OPTIONS, log_every=0, sample_every=0, checkpoint_every=0)
    quiet(tmp_path / "run", options=options, evaluate=rewarding(), judged_by=("reward", "highest"))
    assert (tmp_path / "run" / "finished.json").exists()
    assert "finished after 20 steps" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "changed", [{"steps": 0}, {"log_every": -1}, {"evaluate_every": -2}, {"keep_last": 0}, {"patience": 0}]
)
def test_options_out_of_range_are_refused(changed):
    with pytest.raises(BadInput, match=f"{next(iter(changed))} is"):
        RunOptions(**{"steps": 3, **changed})


def test_report_shows_figures_files_and_next_commands(tmp_path):
    _, said = quiet(tmp_path / "run", next_commands=["llmq generate run"])
    report = said[said.index("finished:") :]
    assert "20 steps" in report and "tokens/s" in report and "peak memory" in report
    assert "best" in report and "losses.png" in report
    assert report.endswith("next:\n  llmq generate run\n")


def test_tokens_that_a_step_drew_or_the_batches_tell_of_all_processes(tmp_path):
    class Told(Batches):
        def count_tokens(self, step):
            return 10 + step

    alone = replace(OPTIONS, checkpoint_every=None)
    assert quiet(None, Told(), options=alone)[0].tokens == sum(10 + step for step in range(STEPS))

    def drawing(state, batch):
        state, metrics = tiny_run.train_step(state, batch)
        return state, {**metrics, "tokens": jnp.int32(7)}  # from a compiled step

    folder = tmp_path / "run"
    output = io.StringIO()
    options = replace(OPTIONS, evaluate_every=0, sample_every=0, plot=False)
    engine.run(tiny_run.new_state(), drawing, Told(), options, folder=folder, output=output)
    assert [record["tokens"] for record in timeless(folder)] == [7 * record["step"] for record in timeless(folder)]
    assert Checkpoints(folder / "checkpoints").restore(tiny_run.new_state(), STEPS).info.tokens == 7 * STEPS


def test_tokens_are_counted_from_the_masks():
    ones, some = jnp.ones((2, 3)), np.array([[1, 0, 0], [1, 1, 0]])
    assert count_tokens({"tokens": ones, "mask": some}) == 3
    assert count_tokens({"tokens": ones, "mask": some, "segment_ids": np.array([[1, 1, 2], [1, 2, 0]])}) == 5
    assert count_tokens({"chosen_mask": some, "rejected_mask": np.ones((2, 3))}) == 9
    assert count_tokens({"tokens": ones, "mask": np.ones(2), "lengths": np.array([3, 1])}) == 4
    assert count_tokens({"tokens": ones}) == 6


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


def test_a_run_may_go_on_without_a_checkpoint_but_for_the_last(whole, tmp_path, monkeypatch):
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
    full_at(monkeypatch, STEPS)
    with pytest.raises(DiskFull, match=f"checkpoints of step {STEPS}: No space left on device; the last good .*16; "):
        tiny_run.run(tmp_path / "last", options=going_on)
    assert not (tmp_path / "last" / "finished.json").exists()
