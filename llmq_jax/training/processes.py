"""Several processes that train one model, once they have joined (joining.py): which of them writes, what they exchange,
and how they stop together.

Every process must run every exchange, in the same order: one that skipped an exchange would leave the others waiting.
Only process 0 writes files and prints.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmq_jax.errors import BadInput
from llmq_jax.training.signals import StopSignals


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_speaks() -> Iterator[None]:
    """Of several processes, show only process 0's standard output."""
    with contextlib.ExitStack() as stack:
        if not first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def wait_for_all(name: str) -> None:
    """Wait until every process has come to this place, which has this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def share(value: Any) -> Any:
    """Process 0's value, on all processes. It must be one that JSON can hold."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    buffer = np.resize(content, size) if first() else np.zeros(size, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8)))


def together(action: Callable[[], Any]) -> Any:
    """Run an action on each process. Where one of them raises BadInput, or an OSError about a file, all raise BadInput
    with the message of the first such process."""
    if jax.process_count() == 1:
        return action()
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
        if multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
