import contextlib
import io
import json
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training import engine
from llmq_jax.training.checkpoints import Checkpoints, load_checkpoint_variables
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.recorder import Recorder
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.signals import StoppedBySignal
from tests.training import tiny_run
from tests.training.compared_runs import assert_same_run, final_state, quiet, timeless
from tests.training.tiny_run import OPTIONS, STEPS, Batches
from tests.weights import assert_equal_trees


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
    assert_equal_trees(final_state(whole), state)


def test_run_leaves_its_files_and_a_checkpoint_to_load(whole):
    assert {"config.json", "metrics.jsonl", "samples.txt", "losses.png", "finished.json"} <= set(os.listdir(whole))
    assert len(Checkpoints(whole / "checkpoints").steps()) in (2, 3)
    loaded = load_checkpoint_variables(whole)
    assert (loaded.config, loaded.info.step) == ({"width": 8}, STEPS)
    assert loaded.info.value == [r for r in timeless(whole) if "validation_loss" in r][-1]["validation_loss"]


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


@pytest.mark.parametrize("under_way", [True, False])
def test_device_is_never_waited_for_before_the_next_step_is_handed_over(monkeypatch, under_way):
    """What is read of step s must come after the call of step s + 1, save where the run pauses or the step is done."""
    order = []

    def step(state, batch):
        order.append(("step", int(state.step) + 1))
        state, metrics = tiny_run.train_step(state, batch)
        return state, metrics

    read = engine._Loop.read
    monkeypatch.setattr(engine._Loop, "read", lambda self, done: (order.append(("read", done.step)), read(self, done)))
    monkeypatch.setattr(engine, "is_under_way", lambda loss: under_way)
    engine.run(tiny_run.new_state(), step, Batches(), RunOptions(steps=4), output=io.StringIO())
    steps, reads = ([(name, number) for number in (1, 2, 3, 4)] for name in ("step", "read"))
    at_once = [event for both in zip(steps, reads, strict=True) for event in both]
    later = [steps[0], *(event for both in zip(steps[1:], reads, strict=False) for event in both), reads[3]]
    assert order == (later if under_way else at_once)


def test_a_record_tells_the_speed_since_the_one_before(tmp_path, monkeypatch):
    speeds = [None, 40.0, 70.0]
    given = iter(speeds)
    monkeypatch.setattr(engine.Pace, "since_mark", lambda self: next(given))
    quiet(tmp_path / "run", options=RunOptions(steps=3, log_every=1))
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["tokens_per_second"] for record in records if "loss" in record] == speeds


class ShorterBatches(Batches):
    """Two columns less from step 4 on."""

    def __getitem__(self, step):
        batch = super().__getitem__(step)
        return {name: array[:, :4] for name, array in batch.items()} if step >= 3 else batch


def test_compiling_is_told_by_itself_whenever_it_is(tmp_path):
    jax.clear_caches()
    options = replace(OPTIONS, steps=6, log_every=1, evaluate_every=0, sample_every=0, checkpoint_every=0)
    quiet(tmp_path / "run", ShorterBatches(), options)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "compiling_seconds" in record] == [1, 4]


def test_a_step_is_read_before_the_next_is_compiled(tmp_path, monkeypatch):
    """Or its time would be lost in the compiling."""
    order = []

    def step(state, batch):
        order.append(("step", int(state.step) + 1))
        return tiny_run.train_step(state, batch)

    read = engine._Loop.read
    monkeypatch.setattr(engine._Loop, "read", lambda self, done: (order.append(("read", done.step)), read(self, done)))
    monkeypatch.setattr(engine, "is_under_way", lambda loss: True)
    engine.run(tiny_run.new_state(), step, ShorterBatches(), RunOptions(steps=5), output=io.StringIO())
    assert order.index(("read", 3)) < order.index(("step", 4)) < order.index(("step", 5)) < order.index(("read", 4))


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


@pytest.mark.parametrize("name", ["evaluate_every", "sample_every", "checkpoint_every"])
def test_interval_that_would_do_nothing_is_refused(name):
    with pytest.raises(BadInput, match=f"{name} is 5, but the run has no"):
        tiny_run.run(None, options=RunOptions(**{"steps": 20, name: 5}), evaluate=None, sample=None)


def test_intervals_are_ten_in_a_run_at_most():
    options = RunOptions(steps=19).resolved(evaluates=True, samples=False, saves=True)
    assert (options.evaluate_every, options.sample_every, options.checkpoint_every) == (2, 0, 2)


def test_zero_means_never(tmp_path):
    options = replace(OPTIONS, log_every=0, evaluate_every=0, sample_every=0, checkpoint_every=0)
    _, said = quiet(tmp_path / "run", options=options)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "step 4:" not in said  # while "step 4%" of the time may well be


@pytest.mark.parametrize(
    "changed", [{"steps": 0}, {"log_every": -1}, {"evaluate_every": -2}, {"keep_last": 0}, {"patience": 0}]
)
def test_options_out_of_range_are_refused(changed):
    with pytest.raises(BadInput, match=f"{next(iter(changed))} is"):
        RunOptions(**{"steps": 3, **changed})


def test_report_shows_figures_files_and_next_commands(tmp_path):
    result, said = quiet(tmp_path / "run", next_commands=["llmq generate run"])
    assert "loss=" in repr(result) and "Array" not in repr(result), "a notebook would print all weights"
    report = said[said.index("finished:") :]
    assert "20 steps" in report and "tokens/s" in report and "peak memory" in report
    assert "best" in report and "losses.png" in report
    assert report.endswith("next:\n  llmq generate run\n")
    concluded = {"conclude": lambda result: f"held out: {result.step}", "next_commands": ["llmq generate run"]}
    _, again = quiet(tmp_path / "run", **concluded)
    assert again.endswith("\n\nheld out: 20\nnext:\n  llmq generate run\n")


def test_tokens_that_a_step_drew_or_the_batches_tell_of_all_processes(tmp_path):
    class Told(Batches):
        def count_tokens(self, step):
            return 10 + step

    alone = replace(OPTIONS, checkpoint_every=None)
    assert quiet(None, Told(), options=alone)[0].tokens == sum(10 + step for step in range(STEPS))

    def drawing(state, batch):
        state, metrics = tiny_run.train_step(state, batch)
        plain = {"next_token_loss": metrics["loss"] - 1}  # which is shown
        return state, {**metrics, **plain, "tokens": jnp.int32(7)}  # from a compiled step

    folder = tmp_path / "run"
    output = io.StringIO()
    options = replace(OPTIONS, evaluate_every=0, sample_every=0, plot=False)
    result = engine.run(tiny_run.new_state(), drawing, Told(), options, folder=folder, output=output)
    assert result.loss == timeless(folder)[-1]["next_token_loss"]
    assert [record["tokens"] for record in timeless(folder)] == [7 * record["step"] for record in timeless(folder)]
    assert Checkpoints(folder / "checkpoints").restore(tiny_run.new_state(), STEPS).info.tokens == 7 * STEPS


def test_the_clock_of_training_stops_for_what_is_done_between_steps(tmp_path, monkeypatch):
    within, seen = [], []

    @contextlib.contextmanager
    def pause(pace):
        within.append(pace)
        yield
        within.pop()

    def evaluate(variables):
        seen.append(len(within))
        return {"loss": 1.0}

    def sample(variables, step):
        seen.append(len(within))
        return ""

    monkeypatch.setattr(engine.Pace, "pause", pause)
    quiet(tmp_path, options=replace(OPTIONS, steps=4, sample_every=2, plot=False), evaluate=evaluate, sample=sample)
    assert seen == [1, 1, 1]


def test_records_are_on_the_disk_before_a_checkpoint_implies_them(tmp_path, monkeypatch):
    done = []
    sync, save = Recorder.sync, Checkpoints.save
    monkeypatch.setattr(Recorder, "sync", lambda *given: (done.append("sync"), sync(*given)))
    monkeypatch.setattr(Checkpoints, "save", lambda *given, **named: (done.append("save"), save(*given, **named))[1])
    options = replace(OPTIONS, evaluate_every=0, sample_every=0, checkpoint_every=10, plot=False)
    engine.run(tiny_run.new_state(), tiny_run.train_step, Batches(), options, folder=tmp_path, output=io.StringIO())
    assert done == ["sync", "save", "sync", "save", "sync"]
