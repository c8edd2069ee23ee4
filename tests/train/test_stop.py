"""The recipe as a user runs it, told to stop, and while another process trains in its folder."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmq_jax.training import Checkpoints

ROOT = Path(__file__).parent.parent.parent


def command(text_file, out):
    options = {
        "data": text_file,
        "out": out,
        "num-hidden-layers": 2,
        "hidden-size": 16,
        "num-attention-heads": 2,
        "context": 16,
        "batch-size": 4,
        "steps": 3000,
        "dropout": 0.1,
        "log-every": 1,
        "evaluate-every": 500,
        "sample-every": 1000,
        "checkpoint-every": 250,
    }
    return [sys.executable, "-m", "train.pretrain", *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.exhaustive
def test_sigterm_saves_and_a_second_process_is_refused(tmp_path, text_file):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(text_file, folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    next(line for line in process.stdout if line.startswith("step"))
    second = subprocess.run(command(text_file, folder), cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.startswith("error: ") and second.stderr.count("\n") == 1 and "another process" in second.stderr
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in output
    step = Checkpoints(folder / "checkpoints").latest_step()
    assert f"after step {step}, which is saved" in output
