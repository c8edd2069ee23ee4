"""The recipe as a user runs it, killed with SIGKILL at arbitrary moments and started again."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llmq_jax.training import Checkpoints, load_checkpoint_variables
from llmq_jax.training.metrics import TIME_FIELDS

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


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIME_FIELDS} for line in lines]


def final_variables(folder):
    return jax.tree.map(np.asarray, load_checkpoint_variables(folder / "checkpoints").variables)


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_as_if_it_had_not_been(tmp_path, text_file):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(text_file, whole), cwd=ROOT, check=True, capture_output=True)
    moments, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(
            command(text_file, killed), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # The first lines come when training starts; a moment later it is killed.
        started = next((line for line in process.stdout if line.startswith(("step", "resuming"))), None)
        if started is not None and kills < 6:
            time.sleep(moments.uniform(0.0, 1.5))
            process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, rest
        kills += 1
    assert kills >= 3, "the run was over before it could be killed often enough to show anything"
    assert records(killed) == records(whole)
    assert (killed / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert Checkpoints(killed / "checkpoints").latest_step() == 3000
    jax.tree.map(np.testing.assert_array_equal, final_variables(killed), final_variables(whole))


@pytest.mark.slow
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
