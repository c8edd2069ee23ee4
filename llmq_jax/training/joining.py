"""How the processes of one command find each other, before JAX's first use: each runs the same command on its own
devices, and JAX joins them.

    python -m train.pretrain ... --coordinator 10.0.0.1:9911 --processes 2 --process 0      on the first machine
    python -m train.pretrain ... --coordinator 10.0.0.1:9911 --processes 2 --process 1      on the second

Under SLURM and Kubernetes these options are not needed. What processes that have joined exchange: processes.py. How the
error of one ends all: last_words.py.
"""

import contextlib
import glob
import os
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from llmq_jax.errors import BAD_INPUT, BadInput, first_line
from llmq_jax.training.last_words import last_words

CLUSTERS = {"SLURM": "SLURM_STEP_NODELIST", "Kubernetes": "JOB_COMPLETION_INDEX"}
"""{cluster: environment variable that it sets for a process that may be one of several}"""
DEVICE_FILES = "/dev/nvidia[0-9]*"
"""One for each GPU of this machine, also of those that SLURM does not manage and does not tell of."""
PATIENCE_SECONDS = 120
"""Time within which all processes must have joined."""


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[None]:
    """Join the processes of this command, by the address at which process 0 listens, or by what a cluster tells; stay
    alone where there is neither, or where `processes` is 1. To be entered before JAX's first use."""
    if not _join(coordinator, processes, process):
        yield
        return
    with last_words():
        yield


def _join(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Join the others; returns whether there may be any."""
    if coordinator is None:
        if process is not None or (processes or 1) > 1:
            raise BadInput(
                "--processes and --process have no effect without --coordinator; give its address, HOST:PORT"
            )
        cluster = next((name for name, variable in CLUSTERS.items() if variable in os.environ), None)
        # In the interactive step of `salloc`, SLURM_NTASKS counts the tasks of the job, and the step has one.
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS"))
        if cluster is None or processes == 1 or tasks == "1":
            return False
        if cluster == "SLURM":
            port = os.environ.setdefault("JAX_COORDINATOR_PORT", str(port_of_step(os.environ)))
            if not _is_port(port):
                raise BadInput(f"JAX_COORDINATOR_PORT is {port!r} and must be a port from 1 to 65535")
            if os.environ.get("SLURM_PROCID") == "0":
                _check_port(int(port), "give all tasks another one in JAX_COORDINATOR_PORT")
        arguments: dict[str, Any] = {}
        where = f"the coordinator that {cluster} tells of"
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not _is_port(port):
            raise BadInput(
                f"--coordinator is {coordinator!r} and must be the address of process 0, HOST:PORT, with a port from 1 "
                "to 65535"
            )
        if processes is None or process is None:
            raise BadInput("--coordinator needs --processes, how many there are, and --process, which one this is")
        if processes < 2:
            raise BadInput(f"--processes is {processes}, and one needs no --coordinator; leave it out")
        if not 0 <= process < processes:
            raise BadInput(f"--process is {process} and must be from 0 to {processes - 1}, one less than --processes")
        if process == 0:
            _check_port(int(port), "give all processes another port in --coordinator, and each its own --process")
        _warn_of_name(coordinator, host)
        arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        where = f"the coordinator at {coordinator}"
    if CLUSTERS["SLURM"] in os.environ:
        arguments["local_device_ids"] = gpus_of_task(os.environ)
    with _patience(where):
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=10 * PATIENCE_SECONDS)
        except Exception as error:  # a cluster may not tell all; JAX's code for Kubernetes raises errors of its own
            said = first_line(error)[:200].rstrip(".")
            raise BadInput(
                f"processes cannot be joined: {said}; give --coordinator, --processes and --process, or --processes 1"
            ) from None
    return True


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 2**16


def port_of_step(environment: Mapping[str, str]) -> int:
    """Port at which process 0 of this SLURM step listens. JAX's own choice is the same for all steps of a job; those
    that run at the same time would join each other."""
    step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    return 2**16 - 1 - zlib.crc32(step.encode()) % 2**12  # above the ports that Linux gives to outgoing connections


def _check_port(port: int, remedy: str) -> None:
    """BadInput where process 0 cannot listen there. JAX would report that by a C++ error; and where another process 0
    of this machine listens there already, both would share the port, and be ended by a signal."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise BadInput(f"process 0 cannot listen at port {port} of its machine ({error.strerror}); {remedy}") from None


def _warn_of_name(coordinator: str, host: str) -> None:
    """Warn of a host name that is not known. This is no error: in Kubernetes a name is not known before its machine is
    ready."""
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a name
        print(
            f"warning: --coordinator {coordinator}: the name {host} is not known here yet "
            f"({getattr(error, 'strerror', error)}); waiting for it, at most {PATIENCE_SECONDS} s",
            file=sys.stderr,
            flush=True,
        )


def gpus_of_task(environment: Mapping[str, str]) -> list[int] | None:
    """Indices of this SLURM task's GPUs among those that it sees: all of them where it is alone on its node, or sees
    only its own; else its equal share. JAX by itself would take one for each task. None: there are no GPUs to divide,
    or JAX_LOCAL_DEVICE_IDS names them."""
    on_node = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    seen = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    tasks = _tasks_on_node(environment)
    if seen is not None:
        count = len([name for name in seen.split(",") if name not in ("", "-1", "NoDevFiles")])
    else:
        count = on_node or (len(glob.glob(DEVICE_FILES)) if tasks == 1 else 0)
    if not count or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    own = count * tasks <= on_node if on_node else "SLURM_GPUS_PER_TASK" in environment
    tasks = 1 if own else tasks
    if count % tasks:
        raise BadInput(
            f"{tasks} tasks of this node cannot share its {count} GPUs evenly; give each task its own, or hide them "
            "(CUDA_VISIBLE_DEVICES=-1)"
        )
    place, each = int(environment["SLURM_LOCALID"]) if tasks > 1 else 0, count // tasks
    return list(range(place * each, (place + 1) * each))


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """The number of tasks on this node. SLURM writes "2(x3),1" for two tasks on each of three nodes, and one on a
    fourth."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, nodes = part.partition("(x")
        counts += [int(count)] * int(nodes.rstrip(")") or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


@contextlib.contextmanager
def _patience(where: str) -> Iterator[None]:
    """Context that ends the process if it takes more than `PATIENCE_SECONDS`: JAX itself would end it by a signal, with
    a trace of its C++. Ctrl-C ends it at once, which Python would not notice while JAX waits."""

    def give_up() -> None:
        print(
            f"error: {where} did not bring the processes together within {PATIENCE_SECONDS} s; look whether all are "
            "running, with the same --processes and each its own --process, and whether they can reach it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(BAD_INPUT)

    timer = threading.Timer(PATIENCE_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    in_main = threading.current_thread() is threading.main_thread()
    by_python = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it may be ignored
    if by_python:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        timer.cancel()
        if by_python:
            signal.signal(signal.SIGINT, signal.default_int_handler)
