"""A recipe in two processes on this machine, joined over loopback: with a device each, and on meshes of 4 each."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training import joining
from llmq_jax.training.joining import gpus_of_task, joined, port_of_step
from tests.devices import with_devices
from tests.forks import Forks
from tests.ports import free_port
from tests.train.test_mesh import ROOT, RUN_RECIPE, SIZES, TELLS, records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    return folder


@pytest.fixture(scope="module")
def forks():
    with Forks("train.pretrain", "llmq_jax.model_files") as forks:
        yield forks


@dataclass
class Begun:
    """A process that trains."""

    forks: Forks
    id: int
    said: Path
    fault: Path
    code: int | None = None

    def wait(self):
        """Its exit code."""
        if self.code is None:
            self.code = self.forks.wait(self.id)
        return self.code

    def has_ended(self):
        return self.code is not None or self.forks.has_ended(self.id)

    def ended(self):
        """(exit code, standard output, standard error)."""
        return self.wait(), self.said.read_text(), self.fault.read_text()


def started(forks, folder, name, out, *options, devices=4, **variables):
    """A process with so many devices; what it says goes to files of that name."""
    data = () if "--data" in options else ("--data", folder / "text.txt")
    words = [*SIZES.split(), *TELLS.split(), *data, "--out", folder / out, *options]
    said, fault = folder / f"{name}.said", folder / f"{name}.fault"
    variables |= with_devices(devices)
    process = forks.begin(RUN_RECIPE, "pretrain", *words, output=said, errors=fault, **variables)
    return Begun(forks, process, said, fault)


@pytest.fixture
def begin(forks, folder, request):
    """`begin(out, *options)` starts a process with 4 or so many devices; none outlives its test."""
    begun = []

    def begin(out, *options, **others):
        begun.append(started(forks, folder, f"{request.node.name}-{len(begun)}", out, *options, **others))
        return begun[-1]

    yield begin
    left = [process for process in begun if process.code is None]
    for process in left:
        os.kill(process.id, signal.SIGKILL)
    for process in left:
        process.wait()


def two(begin, out, *options, other=None, devices=1, **variables):
    """Two processes with these options, the second with `other` ones, and so many devices each."""
    where = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2")
    each = options, other or options
    return [begin(out, *where, "--process", str(i), *each[i], devices=devices, **variables) for i in range(2)]


def ended(processes):
    """(exit code, standard output, standard error) of each."""
    return [process.ended() for process in processes]


def wait_for_steps(run, processes):
    """Until it has told of some."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_bytes()) < 2000:
        for process in processes:
            assert not process.has_ended(), process.fault.read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def alone(forks, folder):
    code, _, fault = started(forks, folder, "alone", "alone", devices=1).ended()
    assert code == 0, fault[-2000:]
    return folder / "alone"


@pytest.mark.exhaustive
def test_two_processes_train_as_one_and_one_goes_on_where_they_stopped(begin, folder, alone):
    first, second = ended(two(begin, "pair", "--mesh", "data=2,fsdp=2,tensor=2", devices=4))
    assert first[0] == second[0] == 0, first[2][-2000:] + second[2][-2000:]
    assert "finished: 12 steps, 1,536 tokens" in first[1] and "step" not in second[1]  # one speaks
    run = folder / "pair"
    assert records(run) == pytest.approx(records(alone), rel=2e-5)  # Adam makes more of rounding
    assert (run / "samples.txt").read_text() == (alone / "samples.txt").read_text()
    # As if they had been killed after step 6.
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints" / "00000012")
    code, said, fault = ended([begin("pair", "--mesh", "fsdp=2", devices=2)])[0]
    assert code == 0 and "from step 6" in said, fault[-2000:]
    assert records(run) == pytest.approx(records(alone), rel=2e-5)


@pytest.mark.exhaustive
def test_two_processes_go_on_where_one_stopped(begin, alone, folder):
    run = folder / "joined"
    shutil.copytree(alone, run)
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints" / "00000012")
    (first, said, fault), (second, *_) = ended(two(begin, "joined", "--mesh", "data=2,fsdp=4", devices=4))
    assert first == second == 0 and "from step 6" in said, fault[-2000:]
    assert records(run) == pytest.approx(records(alone), rel=2e-5)


@pytest.mark.exhaustive
def test_a_signal_to_one_process_stops_both_after_the_same_step(begin, folder):
    processes = two(begin, "stopped", "--steps", "100000", "--checkpoint-every", "100000", "--evaluate-every", "0")
    wait_for_steps(folder / "stopped", processes)
    os.kill(processes[1].id, signal.SIGTERM)
    first, second = ended(processes)
    assert first[0] == second[0] == 128 + signal.SIGTERM, first[2][-2000:] + second[2][-2000:]
    assert "stopped by SIGTERM after step" in first[1]
    (saved,) = (folder / "stopped" / "checkpoints").iterdir()
    assert f"after step {int(saved.name)}, which is saved" in first[1]


def test_processes_that_disagree_stop_at_the_start(begin, folder):
    """Before they look for what the options name: much that follows needs all of them to do the same."""
    often = ("--checkpoint-every", "1")  # may change when a run is resumed, and yet not be another's at the same time
    other = ("--learning-rate", "0.1", "--betas", "0.9", "0.99", "--mesh", "fsdp=2", *often)
    for code, _, fault in ended(two(begin, "apart", "--data", folder / "nowhere", other=(*other, "--data", "no"))):
        assert code == 2 and fault.count("error:") == 1, fault[-2000:]
        assert "process 1: has other options or data than process 0" in fault
        for name in ("data", "learning_rate", "betas [0.9, 0.95] -> [0.9, 0.99]", "checkpoint_every 6 -> 1"):
            assert name in fault
        assert 'mesh "data=2" -> "fsdp=2"' in fault
    assert not (folder / "apart").exists()


@pytest.mark.exhaustive
def test_a_folder_that_cannot_be_made_stops_both_at_once(begin, folder):
    (folder / "file").touch()
    for code, _, fault in ended(two(begin, "file/run")):
        assert code == 2 and f"error: {folder / 'file'} is a file; a run needs a folder" in fault, fault


@pytest.mark.exhaustive
def test_processes_that_are_told_other_numbers_of_them_stop_at_the_start(begin, folder):
    at = ("--coordinator", f"127.0.0.1:{free_port()}")
    processes = [begin("numbers", *at, "--processes", str(2 + i), "--process", str(i), devices=1) for i in range(2)]
    for code, _, fault in ended(processes):
        assert code == 2, fault
        assert "process 1: has other options or data than process 0: processes 2 -> 3" in fault
    assert not (folder / "numbers").exists()


@pytest.mark.exhaustive
def test_a_cluster_is_found_and_what_cannot_be_is_told(begin, folder):
    slurm = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    processes = [begin("slurm", SLURM_PROCID=str(i), SLURM_LOCALID=str(i), devices=1, **slurm) for i in range(2)]
    for wrong, why in (
        (("--processes", "2", "--process", "0"), "have no effect without --coordinator"),
        (("--coordinator", "here"), "must be the address of process 0, HOST:PORT"),
        (("--coordinator", "here:1"), "needs --processes, how many there are, and --process"),
        (("--coordinator", "here:1", "--processes", "2", "--process", "2"), "--process is 2 and must be from 0 to 1"),
        (("--pmap", "--mesh", "data=4"), "--mesh has no effect with --pmap"),
        (("--pmap", "--accumulate", "4"), "a batch of 8 rows in 4 parts cannot be divided among 4 devices"),
    ):
        ((code, _, fault),) = ended([begin("refused", *wrong)])
        assert code == 2 and why in fault and len(fault.splitlines()) == 1, fault
    first, second = ended(processes)
    assert first[0] == second[0] == 0, first[2][-2000:] + second[2][-2000:]
    assert "finished: 12 steps" in first[1]
    assert not (folder / "refused").exists()


def test_a_coordinator_that_does_not_answer():
    lonely = f"'127.0.0.1:{free_port()}', 2, 1"
    program = (
        f"from llmq_jax.training import joining\njoining.PATIENCE_SECONDS = 3\nwith joining.joined({lonely}): pass"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "did not bring the processes together within 3 s" in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.exhaustive
def test_a_coordinator_whose_name_is_not_known_is_told_at_once_and_ctrl_c_ends_the_waiting():
    name = "x" * 64  # longer than any name may be, so that nobody is asked for it
    program = f"from llmq_jax.training import joining\nwith joining.joined('{name}:9911', 2, 1): pass"
    pipes = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        told = process.stderr.readline()
        time.sleep(3)  # JAX waits by now
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
    assert f"warning: --coordinator {name}:9911: the name {name} is not known here yet" in told


def test_a_port_that_cannot_be_listened_at_and_numbers_that_cannot_be_are_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"process 0 cannot listen at port {port} .*already in use"):
            joined(f"127.0.0.1:{port}", 2, 0).__enter__()
    for port in (0, 65536):
        with pytest.raises(BadInput, match="HOST:PORT, with a port from 1 to 65535"):
            joined(f"127.0.0.1:{port}", 2, 1).__enter__()
    for address, processes, process, why in (
        (None, 2, None, "have no effect without --coordinator"),
        (None, None, 1, "have no effect without --coordinator"),
        ("127.0.0.1:1", 2, None, "--coordinator needs --processes, how many there are, and --process"),
        ("127.0.0.1:1", 1, 0, "--processes is 1, and one needs no --coordinator"),
        ("127.0.0.1:1", 2, 2, "--process is 2 and must be from 0 to 1"),
    ):
        with pytest.raises(BadInput, match=why):
            joined(address, processes, process).__enter__()


def test_processes_that_have_joined_are_left_in_peace():
    """By the end of patience; and Ctrl-C is Python's again."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it
    try:
        with joining._patience("nobody"):
            (timer,) = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert timer.finished.is_set() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def of_slurm(**variables):
    """What SLURM tells task 0 of step 0 of two tasks."""
    told = {"JOB_ID": "7", "STEP_ID": "0", "STEP_NODELIST": "127.0.0.1", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}
    return {f"SLURM_{name}": value for name, value in (told | variables).items()}


def test_steps_of_one_job_listen_at_different_ports_and_the_tasks_of_a_step_at_one():
    ports = [port_of_step(of_slurm(STEP_ID=str(step))) for step in range(4)]
    assert len(set(ports)) == 4 and all(61_440 <= port < 65_536 for port in ports)
    assert port_of_step(of_slurm(PROCID="1", LOCALID="1")) == ports[0]
    assert port_of_step(of_slurm(JOB_ID="8")) != ports[0]


def test_a_port_of_slurm_that_is_taken_is_told_at_once(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in (of_slurm() | {"JAX_COORDINATOR_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(BadInput, match=f"cannot listen at port {port} .*another one in JAX_COORDINATOR_PORT"):
            joined(None, None, None).__enter__()
    for wrong in ("here", "99999"):
        monkeypatch.setenv("JAX_COORDINATOR_PORT", wrong)
        with pytest.raises(BadInput, match=f"JAX_COORDINATOR_PORT is '{wrong}' and must be a port from 1 to 65535"):
            joined(None, None, None).__enter__()


def test_the_interactive_step_of_a_job_of_several_tasks_is_alone(monkeypatch):
    for name, value in of_slurm(STEP_NUM_TASKS="1", STEP_ID="4294967290").items():  # as in the shell of salloc -n 2
        monkeypatch.setenv(name, value)
    with socket.create_server(("", 0)) as taken:  # joining would be refused, instead of waiting
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(taken.getsockname()[1]))
        with joined(None, None, None):
            pass
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        with joined(None, 1, None):
            pass


def ends_of_two(second, parting):
    """(exit code, standard error) of two processes, of which the first waits in an exchange, silenced as in saving a
    checkpoint, for the second, that does this in its place. They have so many seconds to part, of which they take as
    many as they need, or all where one cannot."""
    port = free_port()
    program = (
        "import contextlib, io, os, signal, sys\n"
        "from llmq_jax.training import joining, last_words, processes\n"
        f"last_words.GRACE_SECONDS, last_words.PARTING_SECONDS = 1, {parting}\n"
        "process = int(sys.argv[1])\n"
        f"with joining.joined('127.0.0.1:{port}', 2, process):\n"
        "    processes.wait_for_all('both')\n"
        f"    if process == 1: {second}\n"
        "    with contextlib.redirect_stderr(io.StringIO()): processes.wait_for_all('one')\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = {"env": with_devices(1), **pipes}
    processes = [subprocess.Popen([sys.executable, "-c", program, str(i)], **environment) for i in range(2)]
    try:
        faults = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, fault) for process, fault in zip(processes, faults, strict=True)]


def test_the_error_of_one_process_ends_the_others():
    """JAX would wait for minutes, and end both by a signal."""
    first, second = ends_of_two("raise OSError('no room')", parting=40)
    assert first == (2, "error: process 1 ended: OSError: no room; so this one cannot go on\n")
    assert second[0] == 1 and second[1].splitlines()[-1] == "OSError: no room"


@pytest.mark.exhaustive
def test_a_process_that_is_killed_ends_the_others():
    first, second = ends_of_two("os.kill(os.getpid(), signal.SIGKILL)", parting=3)
    assert second == (-signal.SIGKILL, "")
    assert first[0] == 2, first[1]
    assert "BadInput: another process has gone without a word, or cannot be reached (Gloo" in first[1].splitlines()[-1]


@pytest.mark.exhaustive
def test_what_one_process_lacks_ends_both(begin):
    first, second = ended(two(begin, "lacking", other=("--device", "gpu"), CUDA_VISIBLE_DEVICES="-1"))
    told = "--device gpu: JAX finds no GPU here; use --device cpu, or install JAX for your GPU"
    assert first[0] == second[0] == 2
    assert second[2].startswith(f"error: {told}") and second[2].count("\n") == 1
    assert first[2].startswith(f"error: process 1 ended: {told}") and first[2].endswith("; so this one cannot go on\n")


@pytest.mark.parametrize(
    ("told", "gpus"),
    [
        ({}, None),  # CPUs
        ({"SLURM_GPUS_ON_NODE": "8"}, [0, 1, 2, 3, 4, 5, 6, 7]),  # a task for all that its node has
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, [2, 3]),
        # Its own alone; or all, of which it was given one.
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_PER_TASK": "1"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "2", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, [0]),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"},
            [0, 1, 2, 3],
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "2"}
            | {"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_TASK": "1"},
            [2],
        ),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, None),  # none
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "1"}, [0]),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "2"}, [0, 1, 2, 3]),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NODEID": "1"}, [0, 1, 2, 3]),
        ({"SLURM_GPUS_ON_NODE": "4", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
    ],
)
def test_the_gpus_of_a_task(monkeypatch, told, gpus):
    monkeypatch.setattr("llmq_jax.training.joining.DEVICE_FILES", "none")
    assert gpus_of_task({"SLURM_LOCALID": "0", **told}) == gpus


def test_the_gpus_of_a_task_that_slurm_does_not_manage(monkeypatch, tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr("llmq_jax.training.joining.DEVICE_FILES", f"{tmp_path}/nvidia[0-9]*")
    assert gpus_of_task({"SLURM_LOCALID": "0"}) == [0, 1]
    assert gpus_of_task({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}) is None  # JAX gives one to each
    assert gpus_of_task({"SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": ""}) is None


def test_gpus_that_tasks_cannot_share():
    with pytest.raises(BadInput, match="3 tasks of this node cannot share its 4 GPUs evenly"):
        gpus_of_task({"SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "3"})


@pytest.mark.exhaustive
def test_a_signal_without_checkpoints_ends_a_process_at_once(begin, folder):
    endless = ("--steps", "100000", "--checkpoint-every", "0", "--evaluate-every", "0", "--sample-every", "0")
    processes = two(begin, "unsaved", *endless)
    wait_for_steps(folder / "unsaved", processes)
    sent = time.monotonic()
    os.kill(processes[1].id, signal.SIGTERM)
    assert processes[1].wait() == -signal.SIGTERM
    assert time.monotonic() - sent < 60
