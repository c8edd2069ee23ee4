import io
import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training import engine
from llmq_jax.training.checkpoints import Checkpoints
from llmq_jax.training.resuming import resume
from llmq_jax.training.run_folder import RunFolder
from llmq_jax.training.signals import StoppedBySignal
from llmq_jax.training.validation import Validation
from tests.training import tiny_run
from tests.training.compared_runs import (
    assert_same_run,
    broken_at,
    final_state,
    flip_a_bit,
    killed,
    quiet,
    timeless,
)
from tests.training.tiny_run import OPTIONS, STEPS, Batches
from tests.weights import assert_equal_trees


@pytest.mark.exhaustive
def test_killed_at_every_kind_of_point_and_run_again_is_the_same_run(whole, tmp_path):
    folder = tmp_path / "killed"
    kills = (
        "step:3",  # before the first checkpoint
        "torn:6",  # in the middle of a line of metrics.jsonl
        "arrays:8",  # in a checkpoint: arrays written, no manifest
        "manifest:8",  # manifest written, not renamed
        "committed:8",
        "orbax:12",  # 30 ms into a checkpoint
        "deletion:12",  # in the middle of deleting an old checkpoint
        "committed:20",  # the last one, before an older one is deleted
        "plot",  # after the last checkpoint, before the run is marked as finished
        "report",  # the same, later
    )
    code, out, errors = killed(folder, kills)
    assert (code, errors) == (0, "")
    assert "from step 20" in out
    assert_same_run(whole, folder)
    assert json.loads((folder / "finished.json").read_text())["step"] == STEPS
    assert "finished after 20 steps" in (folder / "report.html").read_text()
    assert not [name for name in os.listdir(folder / "checkpoints") if not name.isdigit()]


@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_run_whose_folder_was_moved_saves_nothing_in_its_old_place(whole, tmp_path, begun_anew):
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def move(step):
        if step == 9:
            folder.rename(moved)
            if begun_anew:
                # By a process with the same id, as there are in containers.
                RunFolder(folder, json.loads((moved / "config.json").read_bytes())).close()

    with pytest.raises(BadInput, match=r"run was moved or deleted while .*; where it was moved, the same command"):
        quiet(folder, Batches(move))
    assert not any((folder / "checkpoints").glob("*"))
    quiet(moved)
    assert_same_run(whole, moved)


def test_nor_does_it_write_a_report_there(whole, tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def moving_sample(variables, step):
        if step == STEPS:  # its checkpoint, the last one, is saved
            folder.rename(moved)
            RunFolder(folder, json.loads((moved / "config.json").read_bytes())).close()
        return tiny_run.sample(variables, step)

    with pytest.raises(BadInput, match="run was moved or deleted while"):
        quiet(folder, sample=moving_sample)
    assert not (folder / "finished.json").exists() and not (folder / "report.html").exists()
    quiet(moved)
    assert_same_run(whole, moved)


def test_finished_run_says_so_and_returns_its_result(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*")}
    result, said = quiet(whole, Batches(lambda step: pytest.fail("trained again")))
    assert "is finished already; nothing to do" in said
    assert (result.step, result.best_step is not None) == (STEPS, True)
    assert_equal_trees(result.state, final_state(whole))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.*") if path.name != "run.lock"} == {
        path: time for path, time in before.items() if path.name != "run.lock"
    }


def test_another_schedule_is_another_run(whole, tmp_path):
    """Whether it was stopped or is finished: a script that changes its rate alone would be given the old result."""
    faster = tiny_run.optax.linear_schedule(0.0501, 0.0, STEPS)
    with pytest.raises(BadInput, match=r"another learning rate: 0\.05 in step 1, where it would be 0\.0501; give that"):
        quiet(whole, schedule=faster)
    stopping = Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None)
    with pytest.raises(StoppedBySignal):
        quiet(tmp_path / "run", stopping)
    with pytest.raises(BadInput, match="holds a run with another learning rate"):
        quiet(tmp_path / "run", schedule=faster)
    quiet(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


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


def test_of_steps_after_the_checkpoint_a_run_knows_nothing(tmp_path):
    """Where the newer one is damaged: neither the checkpoints' evaluations nor the records count."""
    validation, checkpoints = Validation(("loss", "lowest")), Checkpoints(tmp_path / "run/checkpoints")
    with RunFolder(tmp_path / "run", {}) as folder:
        for step, value in ((1, 0.5), (2, 0.1)):
            checkpoints.save(step, tiny_run.new_state(), value=value)
            with open(tmp_path / "run/metrics.jsonl", "a") as file:
                for record in ({"loss": float(step)}, {"validation_loss": value}):
                    file.write(json.dumps({"step": step, **record}) + "\n")
        flip_a_bit(checkpoints.path(2))
        resumed = resume(folder, checkpoints, tiny_run.new_state(), validation, None, lambda said: None)
    assert (resumed.info.step, resumed.loss) == (1, 1.0)
    assert validation.values == validation.losses == {1: 0.5}


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(StoppedBySignal):
        quiet(folder, Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None))
    flip_a_bit(folder / "checkpoints" / "00000002")
    metrics = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match=r"no checkpoint in .* is whole"):
        quiet(folder)
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_torn_sample_of_the_checkpoints_step_is_written_anew(whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(9)))
    samples = (folder / "samples.txt").read_text()
    assert samples.startswith("step 8\n")
    (folder / "samples.txt").write_text(samples[:14])
    quiet(folder)
    assert_same_run(whole, folder)


def test_a_finished_run_needs_none_of_its_records(tmp_path):
    quiet(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("{torn\n" * 3)
    assert "is finished already; nothing to do" in quiet(tmp_path / "run")[1]
    (tmp_path / "run/finished.json").write_text("{}")
    with pytest.raises(BadInput, match=r"finished\.json is damaged .*; remove it and run the same again"):
        quiet(tmp_path / "run")


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


def test_a_finished_run_without_a_checkpoint_says_how_to_train_it_anew(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints")
    result, said = quiet(folder)
    assert result.state is None and "run is finished already; nothing to do (it has no checkpoint: to " in said
    assert "--branch-from" not in said
    (folder / "finished.json").unlink()  # as it says
    quiet(folder)
    assert_same_run(whole, folder)


def test_run_folder_of_the_caller_is_used_and_stays_locked(whole, tmp_path):
    with RunFolder(tmp_path / "run", {"lr": 1}) as folder:
        quiet(folder)
        with pytest.raises(BadInput, match="another process"):
            RunFolder(tmp_path / "run", {"lr": 1})
        with pytest.raises(BadInput, match="config has no effect"):
            quiet(folder, config={"lr": 2})
    assert_same_run(whole, tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    with RunFolder(tmp_path / "run", {"lr": 1}) as folder, pytest.raises(BadInput, match=r"step 12, .* has 10 steps"):
        quiet(folder, options=replace(OPTIONS, steps=10))


def test_another_run_is_refused_and_neutral_options_may_change(whole):
    with pytest.raises(BadInput, match=r"options: log_every 2 -> 5;"):
        quiet(whole, options=replace(OPTIONS, log_every=5))
    with pytest.raises(BadInput, match=r"model.width 8 -> 9;"):
        quiet(whole, model_config={"width": 9})
    others = {"sample_every": 3, "evaluate_every": 5, "checkpoint_every": 3, "evaluate_first": True, "profile": "1:2"}
    others |= {"keep_last": 7, "keep_best": False, "plot": False, "tensorboard": True, "on_full_disk": "continue"}
    quiet(whole, options=replace(OPTIONS, **others))


def branching(source, **changed):
    return replace(OPTIONS, branch_from=str(source), **changed)


def test_a_branch_of_a_run_goes_on_from_its_whole_state(whole, tmp_path):
    """With equal options it is that run: dropout's key, the moments and the place in the data come along. Killed before
    its first checkpoint it branches off once more, from the same one, though the other run has gone on meanwhile; after
    it, it goes on from its own. Where it begins it is not evaluated once more."""
    source, folder = tmp_path / "stopped", tmp_path / "branch"
    branched = branching(source, evaluate_first=True)
    for broken, stopped in ((10, 9), (14, 13)):
        with pytest.raises(RuntimeError, match="no batch"):
            quiet(source, Batches(broken_at(stopped)))
        with pytest.raises(RuntimeError, match="no batch"):
            quiet(folder, Batches(broken_at(broken)), branched)
    shutil.rmtree(source)  # which it needs no more
    result, said = quiet(folder, options=branched)
    assert "from step 12" in said
    assert_equal_trees(result.state, final_state(whole))
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
    assert_equal_trees(result.state, final_state(whole))


def test_a_branch_that_begins_anew_has_no_records_of_an_earlier_start(whole, tmp_path):
    """Not even where a script names another checkpoint for it. One that is gone is told."""
    for name, broken in (("00000016", 20), ("00000020", 24)):
        source = tmp_path / name
        shutil.copytree(whole / "checkpoints" / name, source)
        with RunFolder(tmp_path / "run", {"lr": 1}) as folder, pytest.raises(RuntimeError, match="no batch"):
            quiet(folder, Batches(broken_at(broken)), branching(source, steps=28), schedule=None)
    assert [record["step"] for record in timeless(tmp_path / "run")] == [22, 24]
    shutil.rmtree(source)
    with RunFolder(tmp_path / "run", {"lr": 1}) as folder, pytest.raises(BadInput, match="00000020, which is gone"):
        quiet(folder, options=branching(source, steps=28), schedule=None)


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
    assert_equal_trees(result.state, final_state(whole))


def test_evaluations_may_come_at_other_steps_when_a_run_goes_on(whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no batch"):
        quiet(folder, Batches(broken_at(9)))
    result, _ = quiet(folder, options=replace(OPTIONS, evaluate_every=7))
    records = timeless(folder)
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8, 14, 20]
    training = [record for record in records if "loss" in record]
    assert training == [record for record in timeless(whole) if "loss" in record]
    assert_equal_trees(final_state(folder), final_state(whole))
    assert result.best_step == STEPS
