"""How the end of one process ends the others, within seconds.

A process that fails prints its error and leaves. The trap is what becomes of the others: they wait in an exchange (a
collective operation) in which it will never take part, in C++, where no exception of Python's reaches them. JAX ends
them after minutes, with a trace of its C++ and without the cause, which may be in the log of another machine. The
process that failed ends in the same way, since it waits for the others at its exit, so that its exit code is lost.

So the process that fails leaves its error, its last words, in the coordinator's key-value store, and in each process a
thread waits for them. A process that receives them has some seconds to end by itself, since an error that all have
found together is reported by each; then the thread prints them, and ends the process. Work in progress is lost as by a
kill, which leaves no file half-written (atomic_files.py, checkpoints.py).

A process that is killed leaves no last words. On CPUs the exchange breaks off at once, and the error says so. On GPUs
it may not: then JAX ends the others when no sign of life has come for 100 seconds, or at once if process 0 is killed,
since the store goes with it.
"""

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from llmq_jax.errors import BAD_INPUT, BadInput
from llmq_jax.training.signals import StoppedBySignal

KEY = "llmq_jax/last_words"
LONGEST = 1000
"""Greatest number of characters in last words."""
LISTENING_MILLISECONDS = 3_600_000
"""How long one call waits for last words."""
GRACE_SECONDS = 5
"""Time for a process that has received another's last words to end by itself."""
PARTING_SECONDS = 10
"""Time for all processes to leave, some of them after `GRACE_SECONDS`; process 0 waits twice as long, since JAX ends by
a signal those that it leaves behind."""
BROKEN_OFF = re.compile(r"Gloo \S+ failed|NCCL.*remote process exited")
"""How the error of an exchange reads when a process has gone."""


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """Context, for processes that have joined, in which an error of any process ends them all; at its end they part."""
    ending = threading.Lock()  # held by whichever ends this process: its own code, or the thread
    listener = threading.Thread(target=_listen, args=(ending,), daemon=True)
    listener.start()
    try:
        try:
            yield
        finally:
            ending.acquire()  # never released; where the thread holds it, wait for the process's end
    except SystemExit as error:
        if error.code and not isinstance(error, StoppedBySignal):  # which all have agreed on
            _tell("it has exited")
        atexit.register(_part, listener)  # at exit, once the message is printed; likewise below
        raise
    except BaseException as error:
        gone = _of_one_gone(error)
        _tell(_in_one_line(gone or error))
        atexit.register(_parting(listener))
        if gone is not None:
            raise gone from error
        raise
    _part(listener)


def _tell(words: str) -> None:
    state = _state()
    with contextlib.suppress(Exception):  # another was first, or process 0 has gone
        state.client.key_value_set(KEY, f"process {state.process_id} ended: {words[:LONGEST]}")


def _of_one_gone(error: BaseException) -> BadInput | None:
    """The error to raise for an exchange that broke off; None for any other error."""
    broken = BROKEN_OFF.search(str(error))
    return broken and BadInput(
        f"another process has gone without a word, or cannot be reached ({broken[0]}): see how the output of each one "
        "ends, and whether its machine killed it, as for want of memory"
    )


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    said = " ".join(str(error).split())
    return said if isinstance(error, BadInput) else f"{type(error).__name__}: {said}".removesuffix(": ")


def _listen(ending: threading.Lock) -> None:
    client, words = _state().client, None
    while words is None:
        try:
            words = client.blocking_key_value_get(KEY, LISTENING_MILLISECONDS)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # this process has parted, or process 0 has gone
    time.sleep(GRACE_SECONDS)
    if ending.acquire(blocking=False):
        # Printing fails on a full disk, which may be what ended the other process, or where standard error is closed.
        with contextlib.suppress(OSError, ValueError):
            # Not to sys.stderr, which is silenced while a checkpoint is saved.
            print(f"error: {words}; so this one cannot go on", file=sys.__stderr__, flush=True)
        _parting(None)()
        _exit()


def _part(listener: threading.Thread | None) -> None:
    """Leave the others, once they are leaving too."""
    import jax

    with contextlib.suppress(Exception):  # others may have gone already, and JAX counts them
        jax.distributed.shutdown()
    if listener is not None:
        # The shutdown has woken the listener, which must have left JAX's C++ when the interpreter ends: a signal would
        # end it there.
        listener.join(GRACE_SECONDS)


def _parting(listener: threading.Thread | None) -> Callable[[], None]:
    """A function, to be called at exit, that leaves the others, or ends this process if they do not leave in time: JAX
    would wait for minutes, and end it by a signal. The thread is started here, since Python 3.12 starts none at the
    interpreter's exit."""
    leaving = threading.Event()

    def part() -> None:
        leaving.wait()
        _part(listener)

    thread = threading.Thread(target=part, daemon=True)
    thread.start()
    seconds = PARTING_SECONDS * (2 if _state().process_id == 0 else 1)

    def leave() -> None:
        leaving.set()
        thread.join(seconds)
        if thread.is_alive():
            _exit()

    return leave


def _exit() -> NoReturn:
    """End this process at once, whatever else runs."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(BAD_INPUT)


def _state() -> Any:
    """JAX's state of distributed processes, which has no public name."""
    from jax._src import distributed

    return distributed.global_state
