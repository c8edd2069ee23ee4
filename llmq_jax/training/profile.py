"""A trace of some steps by JAX's profiler: what device and host did, and for how long."""

from pathlib import Path
from typing import Any

import jax

from llmq_jax.errors import BadInput

PROFILE = "profile"


def profiled_steps(text: str, steps: int | None, name: str = "profile") -> tuple[int, int]:
    """The first and the last step of a text like "10:15". BadInput where a run of `steps` steps has no such steps."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) <= (steps or int(last))):
        among = f" of {steps}" if steps else ""
        raise BadInput(f"{name} is {text!r} and must be a first and a last step{among}, counted from 1, as 10:15")
    return int(first), int(last)


class Profile:
    """A trace of the steps from the first to the last of `steps`, written into a folder, in a run that goes on after
    step `start`. Without arguments: no trace."""

    def __init__(self, steps: tuple[int, int] = (0, 0), folder: Path | None = None, start: int = 0):
        self.first, self.last = max(steps[0], start + 1), steps[1]
        self.folder = folder
        self.running = self.done = False

    def ends_with(self, step: int) -> bool:
        return self.running and step == self.last

    def mark(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """A context that shows a step in the trace; without one it does nothing."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def begin(self, step: int, state: Any) -> None:
        """Start the trace if this step, which comes next, is the first to trace: once the steps before it, which make
        `state`, are done."""
        if step != self.first or self.first > self.last:
            return
        jax.block_until_ready(state)
        assert self.folder is not None
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # compiling a step makes a million Python calls, which would leave no room
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
        self.running = True

    def stop(self) -> str:
        """Write the trace; returns what to say of it."""
        self.running = False
        jax.profiler.stop_trace()
        self.done = True
        return f"step {self.last}: profile saved"

    def ended(self, step: int) -> str:
        """The run ends after this step, in the middle of the trace or before it; returns what to say of that, if
        anything."""
        if self.running:
            self.last = step
        elif step < self.first <= self.last:
            return f"no profile: the run stopped before step {self.first}"
        return ""

    def close(self) -> None:
        """Write what was traced, when the run has ended or failed."""
        if self.running:
            self.stop()

    def text(self) -> str:
        """How to look at the trace; "" where there is none."""
        if not self.done:
            return ""
        assert self.folder is not None
        newest = max((self.folder / "plugins" / "profile").iterdir())
        return (
            f"profile of steps {self.first} to {self.last}: {self.folder}; to look at it, one of\n"
            f"  xprof --port 8791 {self.folder}    (pip install xprof; with TensorBoard: tensorboard --logdir)\n"
            f"  https://ui.perfetto.dev    (open {newest / 'perfetto_trace.json.gz'} there)"
        )
