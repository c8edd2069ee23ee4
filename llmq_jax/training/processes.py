"""Several processes that train one model: each runs the same command on its own devices, and JAX joins them.

    python -m train.pretrain ... --coordinator 10.0.0.1:9911 --processes 2 --process 0      on the first machine
    python -m train.pretrain ... --coordinator 10.0.0.1:9911 --processes 2 --process 1      on the second

Under SLURM and Kubernetes these options are not needed. Every process must run every exchange, in the same order: one
that skipped an exchange would leave the others waiting. Only process 0 writes files and prints. How the error of one
process ends all: last_words.py.
"""

import contextlib
import glob
import json
import os
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llmq_jax.errors import BAD_INPUT, BadInput, first_line
from llmq_jax.training.last_words import last_words
from llmq_jax.training.signals import StopSignals

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


@contextlib.contextmanager
def one_speaks() -> Iterator[None]:
    """Of several processes, show only process 0's standard output."""
    with contextlib.ExitStack() as stack:
        if not first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
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


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Wait until every process has come to this place, which has this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def share(value: Any) -> Any:
    """Process 0's value, on all processes. It must be one that JSON can hold."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    buffer = np.resize(content, size) if first() else np.zeros(size, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8)))


def together(action: Callable[[], Any]) -> Any:
    """Run an action on each process. Where one of them raises BadInput, or an OSError about a file, all raise BadInput
    with the message of the first such process."""
    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    result, fault = None, ""
    try:
        result = action()
    except BadInput as error:
        fault = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        fault = f"{error.strerror}: {error.filename}"
    faults = np.asarray(multihost_utils.process_allgather(np.int32(bool(fault))))
    if not faults.any():
        return result
    content = np.frombuffer(fault.encode()[:2000].ljust(2000), np.uint8)
    said = bytes(multihost_utils.process_allgather(content)[int(faults.argmax())]).decode(errors="replace").strip()
    raise BadInput(said if faults[0] else f"process {int(faults.argmax())}: {said}")


def of_first(action: Callable[[], Any]) -> Any:
    """The action's result on process 0, which JSON must be able to hold, on all processes; or its BadInput on all."""
    return share(together(lambda: action() if first() else None))


def same(config: dict[str, Any], differences: Callable[[dict[str, Any], dict[str, Any]], list[str]]) -> None:
    """BadInput on all processes where one has other options or other data than process 0."""
    if jax.process_count() == 1:
        return
    theirs, own = share(config), json.loads(json.dumps(config))  # of both, what JSON makes of tuples

    def compare() -> None:
        if found := differences(theirs, own):
            raise BadInput(f"has other options or data than process 0: {', '.join(found)}; give all the same")

    together(compare)


def stop_signals(saves: bool) -> contextlib.AbstractContextManager[StopSignals]:
    """A context that holds signals back until a step is saved. Where nothing is saved there is nothing to wait for:
    signals act at once."""
    alone = jax.process_count() == 1
    if saves:
        return StopSignals() if alone else AgreedStop()
    if not alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has handled it since the processes joined
    return contextlib.nullcontext(StopSignals())


class AgreedStop(StopSignals):
    """SIGTERM to any process stops all of them after the same step."""

    def __enter__(self) -> "AgreedStop":
        return self  # JAX listens for SIGTERM itself since the processes joined

    def after(self, step: int) -> None:
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
