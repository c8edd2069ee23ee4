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
        self._began: float | None = None
        self._first_step = self._first_tokens = 0  # at that time
        self._marked = 0, 0.0  # tokens, seconds of training
        self.step = 0
        self.tokens = 0

    def finished(self, step: int, tokens: int) -> None:
        """Note a finished step. `tokens` are those of the whole run, up to this step."""
        self.step, self.tokens = step, tokens
        if self._began is None:
            self._began = self._now()
            self._first_step, self._first_tokens = step, tokens
            self._marked = tokens, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began, before = self._now(), self._compiled()
        try:
            yield
        finally:
            if self._began is not None:  # what is compiled in the first pauses is not in later ones
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
            if self._began is not None:
                self._compiling += self._compiled() - before

    def seconds(self) -> float:
        """Time spent training, by this process."""
        return 0.0 if self._began is None else self._now() - self._began - self._compiling - self._paused

    @property
    def _timed(self) -> int:
        """Steps since the clock started."""
        return self.step - self._first_step

    def tokens_per_second(self) -> float | None:
        """Mean since the first finished step."""
        if not self._timed:
            return None
        return (self.tokens - self._first_tokens) / max(self.seconds(), 1e-9)

    def since_mark(self) -> float | None:
        """Tokens a second since the last call."""
        if not self._timed:
            return None
        (tokens, seconds), self._marked = self._marked, (self.tokens, self.seconds())
        return (self.tokens - tokens) / max(self._marked[1] - seconds, 1e-9)

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOP utilisation at this speed, where it is known."""
        if self._utilisation is None or tokens_per_second is None:
            return None
        return self._utilisation * tokens_per_second

    def seconds_left(self) -> float | None:
        if not self._timed:
            return None
        return (self.seconds() + self._paused) / self._timed * (self._steps - self.step)
