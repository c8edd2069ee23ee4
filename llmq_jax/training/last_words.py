"""How the end of one process ends the others, within seconds.

A process that fails tells its error and leaves. The trap is what becomes of the others: they wait in an exchange that
it does not come to, in C++, where no exception of Python's reaches them. JAX ends them after minutes, with a trace of
its C++ and without the cause, which may stand in the log of another machine; and it ends the one that failed in the
same way, which waits for the others at its exit, so that its exit code is lost.

So the one that fails leaves its last words in the store of keys that the coordinator keeps, and in each process a
thread waits for them. Who has heard them has some seconds to end by itself, since an error that all have found together
is each one's own; then the thread says them, and ends the process. What is under way is lost as in a kill, by which no
file is half-written (atomic_files.py, checkpoints.py).

A process that is killed leaves no words. On CPUs the exchange breaks off at once, which is told here. On GPUs it need
not: then JAX ends the others when no sign of life has come for 100 seconds; and at once, if it is process 0 that is
killed, with which the store goes.
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
"""Characters of them."""
LISTENING_MILLISECONDS = 3_600_000
"""At a time."""
GRACE_SECONDS = 5
"""For a process that has heard another's to end by itself."""
PARTING_SECONDS = 10
"""For all to leave, of whom some have the grace of others; process 0 has as many again, since JAX ends by a signal whom
it leaves behind."""
BROKEN_OFF = re.compile(r"Gloo \S+ failed|NCCL.*remote process exited")
"""An error of an exchange with a process that has gone."""


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """Within it the error of another process ends this one, as an error here does the others, which have joined before;
    at its end they part."""
    ending = threading.Lock()  # of whichever ends this process: its own course, or the thread
    listener = threading.Thread(target=_listen, args=(ending,), daemon=True)
    listener.start()
    try:
        try:
            yield
        finally:
            ending.acquire()  # for good; where the thread has it, until the process is gone
    except SystemExit as error:
        if error.code and not isinstance(error, StoppedBySignal):  # which all have agreed on
            _tell("it has exited")
        atexit.register(_part, listener)  # when it has been told, as what follows
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
    """What to raise for an exchange that broke off; None for any other error."""
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
        # A full disk, which may be what ended the other one, or a standard error that is closed.
        with contextlib.suppress(OSError, ValueError):
            # Not to sys.stderr, which is silenced while a checkpoint is saved.
            print(f"error: {words}; so this one cannot go on", file=sys.__stderr__, flush=True)
        _parting(None)()
        _exit()


def _part(listener: threading.Thread | None) -> None:
    """Leave the others, when they are leaving, too."""
    import jax

    with contextlib.suppress(Exception):  # others may have gone already, and JAX counts them
        jax.distributed.shutdown()
    if listener is not None:
        # Which that has woken: as the interpreter ends it must not be in JAX's C++, which would end it by a signal.
        listener.join(GRACE_SECONDS)


def _parting(listener: threading.Thread | None) -> Callable[[], None]:
    """What parts at last, or ends this process if others do not leave: JAX would wait for minutes, and end it by a
    signal. Its thread begins here, since at the interpreter's exit Python 3.12 begins none."""
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
    """At once, whatever else runs."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(BAD_INPUT)


def _state() -> Any:
    """JAX's own part in this, which it shows nobody else."""
    from jax._src import distributed

    return distributed.global_state
