"""Where a run's time goes.

On a GPU JAX computes a step while Python goes on, and the loop does not wait for a step just to measure it. What is
counted is the loop's own time, by what it does or waits for anyway.

    compiling    tracing and compiling steps: the first one, and where batches differ in shape, the first of each
    step         handing steps over and waiting for them
    input        making the next batch, if the device ran out of work before the batch was there: at most so much was
                 lost. Otherwise the batch cost nothing, and its time counts as that of the step under way
    evaluation, samples, checkpoints   all of each, with what they compile
    other        metrics, the terminal, a profile
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llmq_jax.training.compile_time import compile_seconds

PARTS = ("compiling", "step", "input", "evaluation", "samples", "checkpoints")
SECONDS = {part: f"{part}_seconds" for part in PARTS}
"""Their names in records."""


class TimeSpent:
    """Seconds of each part, from the making of this object on."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, compiled: Callable[[], float] = compile_seconds):
        self._now, self._compiled = now, compiled
        self._began = now()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marked = dict(self._seconds)
        self.place = "the beginning"
        """What the loop is doing; after an error, what it was doing."""

    @contextlib.contextmanager
    def on(self, part: str, step: int, under_way: Any = None) -> Iterator[None]:
        """Count the time within it for a part. `under_way`: a result of the step that the device may still be computing
        when this part is done."""
        self.place = f"step {step}" if part == "step" else f"the {part} of step {step}"
        began, compiled = self._now(), self._compiled()
        with jax.profiler.TraceAnnotation(part):  # shown in a profile, if one is made
            yield
        if is_under_way(under_way):
            part = "step"
        spent = self._now() - began
        if part == "step":
            compiling = min(self._compiled() - compiled, spent)
            self._seconds["compiling"] += compiling
            spent -= compiling
        self._seconds[part] += spent

    def since_mark(self) -> dict[str, float]:
        """Fields of a record: what each part took since the last call, if anything."""
        before, self._marked = self._marked, dict(self._seconds)
        return {SECONDS[part]: spent for part in PARTS if (spent := round(self._marked[part] - before[part], 6))}

    def total(self) -> dict[str, float]:
        """Seconds of all parts, and of all else as `other`."""
        other = self._now() - self._began - sum(self._seconds.values())
        return {name: round(seconds, 3) for name, seconds in {**self._seconds, "other": other}.items()}


def is_under_way(result: Any) -> bool:
    """Whether the device still computes it. A CPU whose programs run when they are called (`backend.use_device`)
    never does, nor does it what is on the host."""
    return hasattr(result, "is_ready") and not result.is_ready()


def time_text(seconds: dict[str, float]) -> str:
    """ "time: step 81% (40.5 s), evaluation 12% (6.0 s), ...": the greatest first, as far as they can be seen."""
    whole = sum(seconds.values()) or 1.0
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    told = [part for part in parts if part[1] >= 0.05] or parts[:1]
    return "time: " + ", ".join(f"{name} {100 * spent / whole:.0f}% ({spent:,.1f} s)" for name, spent in told)
