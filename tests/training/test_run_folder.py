import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training import run_folder
from llmq_jax.training.checkpoints import INFO, Checkpoints
from llmq_jax.training.run_folder import RunFolder

CONFIG = {"lr": 0.1, "device": "cpu", "data": Path("a/b.txt"), "betas": (0.9, 0.99), "model": {"width": 4, "layers": 2}}


def begun(path, config):
    """A run of which a step is recorded."""
    RunFolder(path, config).close()
    (path / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 3.0}\n{"step": 10, "loss": 2.0}\n')


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_without_room_for_the_lock_is_told_with_its_file(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/run/run\.lock'"):
        RunFolder(tmp_path / "run", CONFIG)


@pytest.mark.parametrize("exists", [True, False])
def test_new_or_empty_folder_becomes_the_runs_own(exists, tmp_path):
    path = tmp_path / "some" / "run"
    if exists:
        path.mkdir(parents=True)
    with RunFolder(path, CONFIG) as folder:
        assert (folder.resumed, folder.finished) == (False, False)
    saved = json.loads((path / "config.json").read_text())
    assert saved == {"run_format": 1, **CONFIG, "data": "a/b.txt", "betas": [0.9, 0.99]}
    assert sorted(os.listdir(path)) == ["config.json", "run.lock"]


def test_same_config_resumes_until_finished(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    with RunFolder(str(tmp_path / "run"), CONFIG) as folder:
        assert (folder.resumed, folder.finished) == (True, False)
        folder.mark_finished({"loss": 1.5})
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        assert (folder.resumed, folder.finished) == (True, True)
        assert folder.report() == {"loss": 1.5}


def test_a_run_that_failed_before_its_first_step_is_begun_with_other_options(tmp_path, capsys):
    begun(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 3.0}\n')
    (tmp_path / "run" / "wandb_id.txt").write_text("a run that has sent its step 0")
    with RunFolder(tmp_path / "run", {**CONFIG, "lr": 0.2}) as folder:
        assert not folder.resumed
    assert "run holds a run with other options that failed before its first step: begun anew" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 0.2
    assert not (tmp_path / "run" / "wandb_id.txt").exists()
    for left in ("samples.txt", "finished.json"):
        (tmp_path / "run" / left).write_text("step 8")
        with pytest.raises(BadInput, match=r"options: lr 0.2 -> 0.1;"):
            RunFolder(tmp_path / "run", CONFIG)
        (tmp_path / "run" / left).unlink()
    (tmp_path / "run" / "checkpoints" / "00000003").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"options: lr 0.2 -> 0.1;"):
        RunFolder(tmp_path / "run", CONFIG)


def test_other_config_lists_every_difference_and_touches_nothing(tmp_path):
    begun(tmp_path / "run", CONFIG)
    before = contents(tmp_path)
    other = {**CONFIG, "lr": 0.2, "device": "gpu", "model": {"width": 8}, "seed": 1}
    with pytest.raises(BadInput) as error:
        RunFolder(tmp_path / "run", other)
    message = str(error.value)
    for difference in (
        "lr 0.1 -> 0.2",
        'device "cpu" -> "gpu"',
        "model.width 4 -> 8",
        "model.layers 2 -> (not set)",
        "seed (not set) -> 1",
    ):
        assert difference in message
    assert "betas" not in message and "data " not in message.partition(";")[0] and "\n" not in message
    assert contents(tmp_path) == before


def test_fields_that_change_no_result_may_change(tmp_path):
    begun(tmp_path / "run", CONFIG)
    other = {**CONFIG, "device": "gpu", "model": {"width": 4, "layers": 3}}
    with RunFolder(tmp_path / "run", other, may_change=["device", "model.layers"]) as folder:
        assert folder.resumed
    with pytest.raises(BadInput, match=r"options: model.layers 2 -> 3;"):
        RunFolder(tmp_path / "run", other, may_change=["device", "model.layer"])
    with RunFolder(tmp_path / "run", other, may_change=["device", "model"]) as folder:
        assert folder.resumed


def test_what_an_older_version_did_not_know_of_is_not_used(tmp_path):
    begun(tmp_path / "run", CONFIG)
    with RunFolder(tmp_path / "run", {**CONFIG, "schedule": None, "separate": False}) as folder:
        assert folder.resumed
    with RunFolder(tmp_path / "run", {**CONFIG, "code": "1f3a"}, may_change=["code"]) as folder:
        assert not folder.code_changed
    with pytest.raises(BadInput, match=r"options: count \(not set\) -> 0;"):
        RunFolder(tmp_path / "run", {**CONFIG, "count": 0})


def test_a_run_that_another_process_began_a_moment_ago_is_looked_at_again(tmp_path, monkeypatch):
    """Before this one has the lock, and after it has found the folder free."""
    take = RunFolder._take_lock

    def late(folder, owner):
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "_take_lock", take)
            RunFolder(folder.path, {**CONFIG, "lr": 0.2}).close()
            (folder.path / "checkpoints" / "00000003").mkdir(parents=True)
        take(folder, owner)

    monkeypatch.setattr(RunFolder, "_take_lock", late)
    with pytest.raises(BadInput, match=r"other options: lr 0\.2 -> 0\.1;"):
        RunFolder(tmp_path / "run", CONFIG)


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "..."},
        {"config.json": '{"model_type": "gpt2"}', "model.safetensors": ""},
        {"config.json": "[1]"},
        {"config.json": "{"},
        {"run.lock": "", "metrics.jsonl": ""},
    ],
)
def test_foreign_folder_is_refused_and_not_touched(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    with pytest.raises(BadInput, match="not empty and not the folder of a run; name a new or empty folder"):
        RunFolder(tmp_path, CONFIG)
    assert contents(tmp_path) == before


def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path):
    """As a locale of ASCII gives that of an umlaut."""
    with pytest.raises(BadInput, match=r"checkpoints need a path in UTF-8; set LC_ALL=C\.UTF-8, or take ASCII letters"):
        RunFolder(tmp_path / "r\udcc3\udcbcn", CONFIG)
    assert not any(tmp_path.iterdir())


def test_a_run_whose_config_is_damaged_is_called_one(tmp_path):
    begun(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / "config.json").write_text('{"')
    with pytest.raises(BadInput, match=r"config.json is damaged, .* resume; put it back, or name a new folder$"):
        RunFolder(tmp_path / "run", CONFIG)
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").path(3)
    checkpoint.mkdir(parents=True)
    (checkpoint / INFO).write_text("{}")
    with pytest.raises(BadInput, match=r"config.json is damaged, so that .*: --init-from .*run$"):
        RunFolder(tmp_path / "run", CONFIG)


@pytest.mark.parametrize("folder", ["new", "new/run", "there"])
def test_a_place_where_nothing_may_be_written_is_refused(folder, tmp_path, monkeypatch):
    """Asked of the system, because a superuser may write anywhere."""
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: False)
    there = tmp_path / "there" if folder == "there" else tmp_path
    with pytest.raises(BadInput, match=f"{tmp_path / folder}: this user may not write in {there}; name another folder"):
        run_folder.config_of_run(tmp_path / folder)


def test_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a")
    with pytest.raises(BadInput, match="run is a file"):
        RunFolder(tmp_path / "run", CONFIG)


def test_killed_while_it_began_is_still_new(tmp_path):
    (tmp_path / "run.lock").write_text("123\n" * 30)  # longer than that of this process
    (tmp_path / ".config.json.partial").write_text("{")
    with RunFolder(tmp_path, CONFIG) as folder:
        assert not folder.resumed
        folder.require_in_place()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "run.lock"]


def test_one_process_at_a_time_and_a_killed_one_holds_no_lock(tmp_path):
    path = tmp_path / "run"
    script = (
        "import sys, time; from llmq_jax.training.run_folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1], {}); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        before = contents(path)
        with pytest.raises(BadInput, match=rf"another process \(id {other.pid}\) is training in {path}"):
            RunFolder(path, {})
        assert contents(path) == before
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with RunFolder(path, {}) as folder:
        assert folder.resumed
        assert (path / "run.lock").read_text().startswith(f"{os.getpid()}\n")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(BadInput, match=r"cannot lock files \(No locks available\); name a folder on another one"):
        RunFolder(tmp_path / "run", CONFIG)


def test_lock_is_given_back_when_opening_fails_and_when_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it was waited for"))
    begun(tmp_path / "run", CONFIG)
    with pytest.raises(BadInput, match="other options"):
        RunFolder(tmp_path / "run", {})
    folder = RunFolder(tmp_path / "run", CONFIG)
    folder.close()
    folder.close()
    RunFolder(tmp_path / "run", CONFIG).close()
