import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training.checkpoints import Checkpoints, load_checkpoint_variables
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.run_options import RunOptions
from tests.training import tiny_run
from tests.training.compared_runs import assert_same_run, broken_at, final_state, killed, quiet, state_at, timeless
from tests.training.old_checkpoints import in_format_1
from tests.training.tiny_run import OPTIONS, PATIENT, STEPS, Batches
from tests.weights import assert_equal_trees


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
    assert checkpoints.steps() == [8, 20]
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


def test_a_run_is_not_judged_by_a_mean_that_nobody_returns(tmp_path):
    """Its best step would be none, and its checkpoint not kept."""
    with pytest.raises(BadInput, match="judged_by is acurracy, and evaluate returns accuracy, loss: name one of these"):
        quiet(tmp_path / "run", judged_by=("acurracy", "highest"), evaluate=lambda _: {"loss": 1.0, "accuracy": 0.5})
    first = replace(OPTIONS, evaluate_first=True)
    with pytest.raises(BadInput, match="judged_by is reward, and evaluate returns loss: name one of these"):
        quiet(tmp_path / "first", judged_by=("reward", "highest"), evaluate=lambda _: {"loss": 1.0}, options=first)
    assert not (tmp_path / "first").exists()


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
    assert checkpoints.steps() == [8, 10]
    result, said = quiet(folder, evaluate=rewarding(begin=8), **REWARDED)
    assert "from step 10" in said
    assert checkpoints.steps() == [8, 20]
    info = load_checkpoint_variables(checkpoints.path(8)).info
    assert (info.judged_by, info.best, info.value) == ("reward", "highest", 0.9)
    assert (result.best_step, result.validation_loss, result.best_validation_loss) == (8, None, None)
    assert json.loads((folder / "finished.json").read_text())["best_step"] == 8
    judged = "\nvalidation reward 0.1000 (best 0.9000 at step 8)\n"
    assert judged in said and judged in quiet(folder, **REWARDED)[1]  # which is finished


def test_a_run_that_goes_on_judged_otherwise_keeps_the_best_checkpoint_by_what_it_is_judged_by_now(tmp_path):
    """Metrics tell which that is. Checkpoints of format 1 do not say what their values are of."""
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    options = replace(OPTIONS, keep_last=1)

    def evaluate(begin):
        reward, losses = rewarding(begin), iter([1.9, 1.8, 1.2, 1.5, 1.7][begin // 4 :])
        return lambda variables: {"loss": next(losses), **reward(variables)}

    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(9)), **REWARDED | {"options": options}, evaluate=evaluate(0))
    in_format_1(checkpoints.path(8))
    result, said = quiet(folder, options=options, evaluate=evaluate(8))
    assert "from step 8" in said
    assert (result.best_step, checkpoints.steps()) == (12, [12, 20])


def test_a_run_from_before_it_was_judged_goes_on(tmp_path):
    """As GRPO's: its checkpoints know nothing of rewards, its metrics do."""
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    options = replace(OPTIONS, keep_last=1)
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(9)), options, evaluate=rewarding())
    config = json.loads((folder / "config.json").read_text())
    del config["options"]["patience"]  # which it did not know of
    (folder / "config.json").write_text(json.dumps(config))
    named = {**REWARDED, "options": options}
    result, _ = quiet(folder, evaluate=rewarding(begin=8), **named)
    assert (result.best_step, checkpoints.steps()) == (8, [8, 20])


def test_the_validation_loss_is_told_beside_what_a_run_is_judged_by(tmp_path):
    both = rewarding()
    options = {**REWARDED, "evaluate": lambda variables: {"loss": 2.0, **both(variables)}}
    result, said = quiet(tmp_path / "run", **options)
    assert (result.best_step, result.validation_loss, result.best_validation_loss) == (8, 2.0, None)
    assert "validation loss 2.0000\nfiles in" in said
    assert "\nvalidation reward 0.1000 (best 0.9000 at step 8)\n" in said
    assert json.loads((tmp_path / "run/finished.json").read_text())["validation_loss"] == 2.0


@pytest.mark.parametrize(
    ("show", "told"),
    [((), "loss 2.0000, margins/of all 3.0000, accuracy 0.5000"), (("accuracy",), "loss 2.0000, accuracy 0.5000")],
)
def test_an_evaluation_is_one_short_line_with_its_checkpoint(show, told, tmp_path):
    """What the run is judged by, then what the console shows of steps too; all of it is in metrics.jsonl."""
    means = {"margins/of_all": 3.0, "accuracy": 0.5, "loss": 2.0}
    _, said = quiet(tmp_path / "run", options=replace(OPTIONS, steps=8), evaluate=lambda variables: means, show=show)
    lines = [line for line in said.splitlines() if "validation" in line and line.startswith("step")]
    assert lines == [f"step {step}: validation {told}; checkpoint saved" for step in (4, 8)]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {f"validation_{name}": value for name, value in means.items()}.items() <= records[-1].items()


def test_the_best_checkpoint_stays_where_the_metrics_are_lost(tmp_path):
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(13)), evaluate=rewarding(), **REWARDED)
    (folder / "metrics.jsonl").unlink()
    assert quiet(folder, evaluate=rewarding(begin=8), **REWARDED)[0].best_step == 8
    assert checkpoints.steps() == [8, 20]


def test_a_new_best_is_what_no_checkpoint_is_as_good_as(tmp_path):
    """Where that of the best step has gone, the next one that is better than those left stays."""
    folder, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run/checkpoints")
    named = {"judged_by": ("reward", "highest"), "options": replace(OPTIONS, checkpoint_every=10, keep_last=1)}
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(11)), evaluate=rewarding(), **named)
    shutil.rmtree(checkpoints.path(8))
    quiet(folder, evaluate=rewarding(begin=8), **named)
    assert checkpoints.steps() == [12, 20]


def test_an_early_end_is_logged_whatever_the_interval(tmp_path):
    options = replace(PATIENT, log_every=9)
    result, _ = quiet(tmp_path / "run", options=options, evaluate=tiny_run.turning)
    records = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in record]
    assert (records[-1]["step"], records[-1]["loss"]) == (14, pytest.approx(result.loss))


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
    assert_equal_trees(final_state(folder), state_at(tmp_path / "run", 14))


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
    kills = ("step:7", "torn:10", "manifest:12", "step:13", "manifest:14", "committed:14", "plot")
    code, out, errors = killed(folder, kills, "patient")
    assert (code, errors) == (0, "")
    assert "from step 14" in out and STOPPED in out
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


FIRST = replace(OPTIONS, evaluate_first=True)


def test_what_a_run_begins_from_is_evaluated_and_changes_nothing_else(whole, tmp_path):
    _, said = quiet(tmp_path / "run", options=FIRST)
    first, *others = timeless(tmp_path / "run")
    began = tiny_run.evaluate(tiny_run.new_state().variables)["loss"]
    assert first == {"step": 0, "tokens": 0, "validation_loss": began}
    assert said.splitlines()[0] == f"step 0: validation loss {began:.4f}"
    assert others == timeless(whole)
    assert_equal_trees(final_state(tmp_path / "run"), final_state(whole))


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
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [8, 12, 16]


def test_an_evaluation_at_first_is_refused_where_a_run_has_none(tmp_path):
    for evaluate, every in ((None, None), (tiny_run.evaluate, 0)):
        with pytest.raises(BadInput, match="evaluate_first is asked for, but the run has no evaluations; give it some"):
            quiet(tmp_path / "run", options=replace(FIRST, evaluate_every=every), evaluate=evaluate)


def test_what_decides_where_a_run_ends_must_stay(impatient):
    folder, _ = impatient
    for changed, said in (
        ({"patience": 5}, r"options: patience 4 -> 5;"),
        ({"patience": None}, r"options: patience 4 -> null;"),
        ({"evaluate_every": 3}, r"options: evaluate_every 2 -> 3;"),
    ):
        with pytest.raises(BadInput, match=said):
            quiet(folder, options=replace(PATIENT, **changed), evaluate=tiny_run.turning)


def test_patience_cannot_begin_in_the_middle_of_a_run(whole):
    with pytest.raises(BadInput, match=r"options: patience null -> 2;"):
        quiet(whole, options=replace(OPTIONS, patience=2))


def test_evaluation_may_know_other_figures_than_a_loss(tmp_path):
    options = RunOptions(steps=2, evaluate_every=2, tensorboard=False, plot=False)
    result, _ = quiet(tmp_path / "run", options=options, evaluate=lambda variables: {"accuracy": np.float32(0.5)})
    assert (result.validation_loss, result.best_step) == (None, None)
    assert timeless(tmp_path / "run")[-1] == {"step": 2, "tokens": result.tokens, "validation_accuracy": 0.5}


def test_a_run_without_any_loss_to_draw_ends_too(tmp_path):
    """As GRPO's does, whose evaluation has a reward and no loss, with --log-every 0."""
    options = replace(OPTIONS, log_every=0, sample_every=0, checkpoint_every=0)
    quiet(tmp_path / "run", options=options, evaluate=rewarding(), judged_by=("reward", "highest"))
    assert (tmp_path / "run" / "finished.json").exists()
    assert "finished after 20 steps" in (tmp_path / "run" / "report.html").read_text()
