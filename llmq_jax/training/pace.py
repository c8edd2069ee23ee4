"""How fast a run goes: tokens a second of training, and the time left."""

import contextlib
import time
from collections.abc import Callable, Iterator

from llmq_jax.training.compile_time import compile_seconds


class Pace:
    """The speed of a run; `finished` is called after every step. The clock starts when the first step is finished, and
    stops while a later one is compiled, so that compiling does not count. Nor do pauses (evaluation, samples,
    checkpoints), except for the time left, which they lengthen. `utilisation` is the MFU of one token a second, where
    it is known: see flops.py."""

    def __init__(
        self,
        steps: int,
        now: Callable[[], float] = time.perf_counter,
        utilisation: float | None = None,
        compiled: Callable[[], float] = compile_seconds,
    ):
        self._steps = steps
        self._utilisation = utilisation
        self._now, self._compiled = now, compiled
        self._paused = self._compiling = 0.0
        self._first: tuple[int, int, float] | None = None  # step, tokens, time
        self._marked: tuple[int, float] | None = None  # tokens, seconds of training
        self.step = 0
        self.tokens = 0

    def finished(self, step: int, tokens: int) -> None:
        """Note a finished step. `tokens` are those of the whole run, up to this step."""
        self.step, self.tokens = step, tokens
        if self._first is None:
            self._first = step, tokens, self._now()
            self._marked = tokens, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began, before = self._now(), self._compiled()
        try:
            yield
        finally:
            if self._first is not None:  # what is compiled in the first pauses is not in later ones
                compiling = self._compiled() - before
                self._compiling += compiling
                self._paused += self._now() - began - compiling

    @contextlib.contextmanager
    def handing_over(self) -> Iterator[None]:
        """Context for handing a step to the device, which compiles it if its batch is the first of its shape."""
        before = self._compiled()
        try:
            yield
        finally:
            if self._first is not None:
                self._compiling += self._compiled() - before

    def seconds(self) -> float:
        """Time spent training, by this process."""
        return 0.0 if self._first is None else self._now() - self._first[2] - self._compiling - self._paused

    def tokens_per_second(self) -> float | None:
        """Mean since the first finished step."""
        if self._first is None or self.step == self._first[0]:
            return None
        return (self.tokens - self._first[1]) / max(self.seconds(), 1e-9)

    def since_mark(self) -> float | None:
        """Tokens a second since the last call."""
        if self._marked is None or self._first is None or self.step == self._first[0]:
            return None
        (tokens, seconds), self._marked = self._marked, (self.tokens, self.seconds())
        return (self.tokens - tokens) / max(self._marked[1] - seconds, 1e-9)

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOP utilisation at this speed, where it is known."""
        if self._utilisation is None or tokens_per_second is None:
            return None
        return self._utilisation * tokens_per_second

    def seconds_left(self) -> float | None:
        if self._first is None or self.step == self._first[0]:
            return None
        step, _, began = self._first
        return (self._now() - began - self._compiling) / (self.step - step) * (self._steps - self.step)
