"""Decisions of a run in two processes on this machine: what both must do at once, both must decide alike."""

import subprocess
import sys
from pathlib import Path

import tiny_run

from tests.devices import with_devices
from tests.train.test_mesh import free_port

# Each measures another loss, lowest after another step: by itself one would stop after step 14, the other after 10.
STOPS_EARLY = """
import sys
import jax, tiny_run
from dataclasses import replace
from llmq_jax.training.processes import joined

address, process = sys.argv[1], int(sys.argv[2])
with joined(address, 2, process):
    losses = iter([[3.0, 2.0, 2.0, 1.0], [3.0, 1.0, 2.0, 2.0]][process] + [2.5] * 6)
    options = replace(tiny_run.PATIENT, patience=3, checkpoint_every=None)
    result = tiny_run.run(None, options=options, evaluate=lambda variables: {"loss": next(losses)})
    print("ended", result.step, result.best_step, flush=True)
"""


# A disk of its own for each, under the same name as the other's.
OPENS_ITS_OWN = """
import os, sys
from llmq_jax.training import run_folder
from llmq_jax.training.processes import joined

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.makedirs(f"{folder}/{process}", exist_ok=True)
os.chdir(f"{folder}/{process}")
run_folder.SEEN_SECONDS = 0.5
with joined(address, 2, process):
    run_folder.RunFolder("run", {"steps": 3})
"""


def two(program, *arguments):
    """(exit code, standard output, standard error) of two processes with a device each."""
    address = f"127.0.0.1:{free_port()}"
    paths = f"{Path(tiny_run.__file__).parent}:{Path(__file__).parents[2]}"
    environment = {**with_devices(1), "PYTHONPATH": paths}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [
        subprocess.Popen([sys.executable, "-c", program, address, str(process), *map(str, arguments)], **pipes)
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, *said) for process, said in zip(processes, outputs, strict=True)]


def test_two_processes_stop_early_after_the_same_step():
    both = two(STOPS_EARLY)
    assert [code for code, _, _ in both] == [0, 0], both
    assert [out.splitlines()[-1] for _, out, _ in both] == ["ended 14 8"] * 2


def test_processes_that_do_not_see_the_same_folder_stop_at_the_start(tmp_path):
    """They would wait for ever at the first checkpoint, for arrays that are written elsewhere."""
    for _, _, fault in two(OPENS_ITS_OWN, tmp_path):
        told = f"process 1: {tmp_path / '1' / 'run'} is not the folder that process 0 trains in"
        assert told in fault.splitlines()[-1], fault[-2000:]
    assert [path.name for path in (tmp_path / "0" / "run").iterdir()] == ["run.lock"]  # as where none has begun
    assert not (tmp_path / "1" / "run").exists()
