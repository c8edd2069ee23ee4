"""The end of a run: its figures as values, as a file and as text."""

import dataclasses
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from llmq_jax.counts import counted
from llmq_jax.training.progress import clock
from llmq_jax.training.run_folder import LOCK
from llmq_jax.training.time_spent import time_text


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `run` returns. Times and peak memory are those of the process that finished the run."""

    state: Any = dataclasses.field(repr=False)
    """The last state; None where a run that was finished before has no checkpoint of its last step."""
    step: int
    tokens: int
    loss: float | None = None
    reward: float | None = None
    """Of the last step, where the run learns from rewards."""
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int | None = None
    seconds: float | None = None
    """Time spent training, without compiling, evaluation, samples and checkpoints."""
    time: dict[str, float] | None = None
    """Seconds of the whole process, by what they were spent on: see time_spent.py."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOP utilisation, where it is known: see flops.py."""
    peak_memory_bytes: int | None = None
    """Peak on the accelerator, or of the process where there is none."""

    def figures(self) -> dict[str, Any]:
        """All but the state."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "state"}


def device_memory_bytes() -> int | None:
    """The most bytes that the accelerator has held so far; None where JAX does not tell, as for a CPU."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return int(statistics["peak_bytes_in_use"]) if "peak_bytes_in_use" in statistics else None


def peak_memory_bytes() -> int:
    """Peak memory in bytes: the accelerator's where JAX tells it (GPU), otherwise the process's."""
    if (held := device_memory_bytes()) is not None:
        return held
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report_text(result: RunResult, folder: Path | None, further: str) -> str:
    parts = [f"{counted(result.step, 'step')}, {result.tokens:,} tokens"]
    if result.seconds is not None:
        parts.append(f"{clock(result.seconds)} of training")
    if result.tokens_per_second is not None:
        parts.append(f"{result.tokens_per_second:,.0f} tokens/s")
    if result.mfu is not None:
        parts.append(f"MFU {result.mfu:.1%}")
    if result.peak_memory_bytes is not None:
        parts.append(f"peak memory {result.peak_memory_bytes / 2**20:,.0f} MiB")
    lines = ["", "finished: " + ", ".join(parts)]
    lines += [time_text(result.time)] if result.time else []
    losses = [] if result.loss is None else [f"training loss {result.loss:z.4f}"]
    if result.reward is not None:  # GRPO's loss is about 0 whatever the policy
        losses = [f"reward {result.reward:z.4f}"]
    if result.validation_loss is not None:
        best = ""
        if result.best_validation_loss is not None:
            best = f" (best {result.best_validation_loss:z.4f} at step {result.best_step:,})"
        losses.append(f"validation loss {result.validation_loss:z.4f}{best}")
    lines += [", ".join(losses)] if losses else []
    if folder is not None:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != LOCK)
        shown = [f"{name}/" if (folder / name).is_dir() else name for name in names]
        lines.append(f"files in {folder}: {', '.join(shown)}")
    lines += [further] if further else []
    return "\n".join(lines)
