import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from compared_runs import quiet
from tiny_run import OPTIONS, Batches

from llmq_jax.errors import BadInput
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.signals import StoppedBySignal
from llmq_jax.training.trackers import TensorBoard, WeightsAndBiases, require_wandb


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
    import subprocess

    code = (
        "import sys; from llmq_jax.training.trackers import _tensorboard_format; _tensorboard_format(); "
        "assert 'torch' not in sys.modules; import tensorboardX"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_that_is_not_installed_is_one_line_before_anything_runs(monkeypatch, tmp_path):
    import tiny_run

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"wandb is not installed; pip install -e '\.\[wandb\]'"):
        require_wandb()
    with pytest.raises(BadInput, match="wandb is not installed"):
        tiny_run.run(tmp_path / "run", options=RunOptions(steps=2, wandb="project"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="wandb is asked for, but the run has no folder"):
        tiny_run.run(None, options=RunOptions(steps=2, wandb="project"))


def test_wandb_resumes_under_the_same_id(monkeypatch, tmp_path):
    calls = []
    run = SimpleNamespace(
        log=lambda figures, step: calls.append(("log", figures, step)), finish=lambda: calls.append("finish")
    )
    fake = SimpleNamespace(
        util=SimpleNamespace(generate_id=lambda: f"id{len(calls)}"),
        init=lambda **arguments: (calls.append(arguments), run)[1],
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(Path, "write_text", None)  # which a kill could tear
    for _ in range(2):
        tracker = WeightsAndBiases("project", tmp_path, "name", {"lr": 1})
        tracker.write({"step": 3, "loss": 0.5, "none": None})
        tracker.close()
    init, *rest = calls[:3]
    assert (init["project"], init["id"], init["resume"], init["config"]) == ("project", "id0", "allow", {"lr": 1})
    assert rest == [("log", {"loss": 0.5}, 3), "finish"]
    assert calls[3] == init
