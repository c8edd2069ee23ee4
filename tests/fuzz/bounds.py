"""Limits on what reading one damaged input may take: a hang and an allocation without bounds become failures."""

import contextlib
import faulthandler
import resource
import signal
from collections.abc import Iterator

SECONDS = 10.0
"""Of this process's own time, for one input, which takes milliseconds: what others use of the machine does not
count. What waits for ever without working ends as what is stuck."""
STUCK_SECONDS = 120.0
"""What is stuck in compiled code cannot be interrupted: after that, and a second an input, it ends the process with a
traceback."""
MEMORY = 2**30
"""Address space that a reader may take on top of what the process had."""


class Hang(BaseException):
    """Not an Exception: nothing that is read may swallow it."""


@contextlib.contextmanager
def bounded(inputs: int) -> Iterator[None]:
    """While so many inputs are read."""
    faulthandler.dump_traceback_later(STUCK_SECONDS + inputs, exit=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def bounded_time() -> Iterator[None]:
    def hang(*_):
        raise Hang(f"it was not read within {SECONDS:g} seconds of work")

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
