import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.signals import StoppedBySignal
from llmq_jax.training.trackers import WANDB_ID, TensorBoard, require_wandb
from tests.training.compared_runs import quiet
from tests.training.tiny_run import OPTIONS, Batches


def events(folder):
    """Every event in the files of a folder, as (purging session start | tag, step, value)."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.iterdir()):  # as TensorBoard reads them: two may have been written in the same tick
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found.append(("start", event.step, None))
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_gets_every_figure_and_purges_on_resume(tmp_path):
    board = TensorBoard(tmp_path)
    board.write({"step": 1, "loss": 0.5, "tokens_per_second": None})
    board.write({"step": 2, "validation_loss": 0.25})
    board.close()
    assert events(tmp_path) == [("training/loss", 1, 0.5), ("validation/loss", 2, 0.25)]
    board = TensorBoard(tmp_path / "resumed", resume_step=1)
    board.close()
    assert events(tmp_path / "resumed") == [("start", 2, None)]


def test_tensorboard_purges_too_where_a_run_starts_again_from_step_0(tmp_path):
    folder = tmp_path / "board"
    board = TensorBoard(folder)
    board.write({"step": 1, "loss": 0.5})
    board.close()
    (old,) = folder.iterdir()
    old.rename(folder / "events.out.tfevents.1")  # of long ago: names are by the time
    TensorBoard(folder).close()
    assert events(folder) == [("training/loss", 1, 0.5), ("start", 1, None)]


def test_tensorboard_is_told_from_where_a_run_goes_on(tmp_path):
    options = replace(OPTIONS, steps=8, evaluate_every=0, sample_every=0, plot=False, tensorboard=True)
    with pytest.raises(StoppedBySignal):
        quiet(tmp_path, Batches(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None), options)
    quiet(tmp_path, options=options)
    assert [step for tag, step, _ in events(tmp_path / "tensorboard") if tag == "start"] == [6]


def test_tensorboard_does_not_load_torch():

    code = (
        "import sys; from llmq_jax.training.trackers import _tensorboard_format; _tensorboard_format(); "
        "assert 'torch' not in sys.modules; import tensorboardX"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_that_is_not_installed_is_one_line_before_anything_runs(monkeypatch, tmp_path):
    from tests.training import tiny_run

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"wandb is not installed; pip install -e '\.\[wandb\]'"):
        require_wandb()
    with pytest.raises(BadInput, match="wandb is not installed"):
        tiny_run.run(tmp_path / "run", options=RunOptions(steps=2, wandb="project"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="wandb is asked for, but the run has no folder"):
        tiny_run.run(None, options=RunOptions(steps=2, wandb="project"))


def sent_offline(run_file):
    """(id of the run, its options, the figures that were logged) in a file that W&B would send later. It is a log of
    LevelDB: after 7 bytes, records of 4 bytes of checksum, 2 of length, and 1 that says 1 for a whole record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records = run_file.read_bytes()[7:], []
    while data:
        length, kind = int.from_bytes(data[4:6], "little"), data[6]
        assert kind == 1
        records.append(Record.FromString(data[7 : 7 + length]))
        data = data[7 + length :]

    def read(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    (begun,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    history = [read(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    return begun.run_id, read(begun.config.update), history


def with_wandb(home, code, **variables):
    """Standard output of a program with the real W&B. It has a process of its own, since W&B keeps settings, threads
    and a service for all of one."""
    program = (
        "from pathlib import Path\n"
        "from llmq_jax.errors import BadInput\n"
        "from llmq_jax.training.trackers import WeightsAndBiases\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    apart = {"HOME": str(home), "NETRC": str(home / "none"), "WANDB_SILENT": "true"}
    asked = [sys.executable, "-c", program + code]
    done = subprocess.run(asked, env=kept | apart | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_resumes_under_the_same_id(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / WANDB_ID).write_text("that-of-before")
    code = (
        "for step, name in ((3, 'new'), (4, 'resumed')):\n"
        f"    tracker = WeightsAndBiases('project', Path({str(tmp_path)!r}) / name, name, {{'lr': 1}})\n"
        "    tracker.write({'step': step, 'loss': 0.5, 'none': None})\n"
        "    tracker.close()\n"
    )
    with_wandb(tmp_path, code, WANDB_MODE="offline")
    files = [next((tmp_path / name / "wandb" / "latest-run").glob("*.wandb")) for name in ("new", "resumed")]
    (new, options, logged), (resumed, _, later) = map(sent_offline, files)
    assert new == (tmp_path / "new" / WANDB_ID).read_text() and options["lr"] == 1
    assert resumed == "that-of-before"
    figures = [{name: line.get(name) for name in ("_step", "loss", "none")} for line in logged + later]
    assert figures == [{"_step": step, "loss": 0.5, "none": None} for step in (3, 4)]


def test_wandb_that_does_not_know_the_user_is_bad_input(tmp_path):
    code = (
        f"try: WeightsAndBiases('project', {str(tmp_path)!r}, 'name', {{}})\nexcept BadInput as error: print(error)\n"
    )
    told = with_wandb(tmp_path, code)
    assert told.startswith("W&B did not begin: No API key configured.")
    assert told.count("\n") == 1 and "set WANDB_MODE=offline" in told
