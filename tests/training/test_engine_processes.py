"""Decisions of a run in two processes on this machine: what both must do at once, both must decide alike."""

import subprocess
import sys
from pathlib import Path

import tiny_run

from tests.devices import with_devices
from tests.train.test_mesh import free_port

# Each measures another loss, lowest after another step: by itself one would stop after step 14, the other after 10.
PROGRAM = """
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


def test_two_processes_stop_early_after_the_same_step():
    address = f"127.0.0.1:{free_port()}"
    paths = f"{Path(tiny_run.__file__).parent}:{Path(__file__).parents[2]}"
    environment = {**with_devices(1), "PYTHONPATH": paths}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, address, str(process)], **pipes) for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out.splitlines()[-1] for out, _ in outputs] == ["ended 14 8"] * 2
