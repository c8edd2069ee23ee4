"""Stopping a run from outside: SIGTERM (a cluster that wants its machine back) and SIGINT (Ctrl-C)."""

import signal
import threading
from typing import Any


class StoppedBySignal(SystemExit):
    """A run was told to stop, and has saved what it could. Exits with 128 + the signal's number, as shells have it."""


class StopSignals:
    """While entered, the first SIGTERM or SIGINT only sets `received`: the loop ends its step, saves and leaves. A
    second one acts as if there were no handler. The handlers from before come back at the end.

    Outside the main thread Python allows no handlers; then `received` stays None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def after(self, step: int) -> None:
        """Called after each step."""

    def _receive(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
