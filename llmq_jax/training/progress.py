"""How a run tells its progress: a bar on a terminal, plain lines elsewhere (a file, a pipe, a cluster's log)."""

import os
import time
from dataclasses import dataclass
from io import TextIOBase
from typing import Any, TextIO

REFRESH_SECONDS = 0.1


TextOutput = TextIOBase | TextIO


@dataclass(frozen=True)
class Status:
    """Where a run stands after `step`; None for what is not known (yet)."""

    step: int
    loss: float
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    mfu: float | None = None
    """Model FLOP utilisation."""
    shown: tuple[tuple[str, float], ...] = ()
    """Further metrics to show: (name, value)."""


class LineProgress:
    """One line for each logged step, columns aligned."""

    def __init__(self, steps: int, file: TextOutput):
        self.steps = steps
        self.file = file

    def update(self, status: Status, logged: bool) -> None:
        if logged:
            width = len(str(self.steps))
            loss, rate, speed, left = _figures(status)
            others = "".join(f"{name} {value:>z7.4f}  " for name, value in status.shown)
            mfu = "" if status.mfu is None else f"  MFU {status.mfu:>5.1%}"
            self.message(
                f"step {status.step:>{width}}/{self.steps}  {100 * status.step // self.steps:>3}%  loss {loss:>7}  "
                f"{others}lr {rate:>8}  {speed:>5} tokens/s{mfu}  ETA {left:>7}"
            )

    def message(self, text: str) -> None:
        print(text, file=self.file, flush=True)

    def close(self) -> None:
        pass


class BarProgress:
    """A bar that every step moves; messages appear above it."""

    def __init__(self, steps: int, file: Any, start: int = 0):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # Refreshed from the loop: no thread that would compete with it.
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total} {task.percentage:>3.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=file, highlight=False),
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, figures="compiling")
        self._status: Status | None = None
        self._refreshed = 0.0
        self._bar.start()
        self._bar.refresh()

    def update(self, status: Status, logged: bool) -> None:
        self._status = status
        if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._show()

    def message(self, text: str) -> None:
        self._show()
        self._bar.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        self._show()
        self._bar.stop()

    def _show(self) -> None:
        self._refreshed = time.monotonic()
        if self._status is not None:
            loss, rate, speed, left = _figures(self._status)
            others = "".join(f"{name} {value:z.3f} " for name, value in self._status.shown)
            mfu = "" if self._status.mfu is None else f" MFU {self._status.mfu:.0%}"
            figures = f"loss {loss} {others}lr {rate} {speed:>5} tokens/s{mfu} ETA {left:>5}"
            self._bar.update(self._task, completed=self._status.step, figures=figures, refresh=True)


def make_progress(steps: int, file: TextOutput, start: int = 0) -> LineProgress | BarProgress:
    if file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return BarProgress(steps, file, start)
    return LineProgress(steps, file)


def short_count(value: int | float) -> str:
    """At most five characters: 987, 12.3k, 1.20M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"


def clock(seconds: int | float) -> str:
    """4:05, 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _figures(status: Status) -> tuple[str, str, str, str]:
    """Loss, learning rate, speed and time left as text."""
    return (
        f"{status.loss:z.4f}",
        "-" if status.learning_rate is None else f"{status.learning_rate:.2e}",
        "-" if status.tokens_per_second is None else short_count(status.tokens_per_second),
        "-" if status.seconds_left is None else clock(status.seconds_left),
    )
