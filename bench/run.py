"""Measure ourselves beside PyTorch: the same weights and batches, interleaved in one run.

    python -m bench.run                               every row
    python -m bench.run gpt2-step-256 --rounds 9      one of them
    python -m bench.run --write docs/benchmarks.md    and write the report

Every side runs in a process of its own, one at a time: the others wait, asleep. Ratios are medians over rounds, in each
of which every side had its turn. Exit code 0 whatever the figures are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmq_jax.command_line import run
from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.options import Positional, default_is

ENOUGH_ROUNDS = 5
"""For a report that is kept."""


@dataclass(frozen=True)
class Options:
    rows: Annotated[Positional[tuple[str, ...]], default_is("all")] = ()
    """Names of what to measure."""
    rounds: int = 7
    """Turns of every side; the figures are medians over them."""
    seconds: float = 1.0
    """Length of a side's turn, about."""
    write: Annotated[str | None, default_is("nothing")] = None
    """File to write the report to, in Markdown, after every row; rows of it that are not measured now stay."""


def main(options: Options) -> None:
    from bench.rows import ROWS

    for name in options.rows:
        if name not in ROWS:
            raise BadInput(f"unknown row {name!r}: {did_you_mean(name, ROWS)}")
    if options.rounds < 1:
        raise BadInput(f"--rounds {options.rounds} must be at least 1")
    if not 0 < options.seconds < float("inf"):
        raise BadInput(f"--seconds {options.seconds:g} must be positive")
    if options.write is not None and options.rounds < ENOUGH_ROUNDS:
        raise BadInput(f"--write wants at least {ENOUGH_ROUNDS} rounds, not {options.rounds}: raise --rounds")
    if options.write is not None and not Path(options.write).parent.is_dir():
        raise BadInput(f"--write {options.write}: there is no folder {Path(options.write).parent}; make it first")

    from rich.console import Console

    from bench.measure import measure
    from bench.report import Report, remarks

    console, progress = Console(highlight=False), Console(stderr=True, highlight=False)
    console.width = max(console.width, 140)  # whole tables, in files too
    written = options.write is not None and Path(options.write).is_file()
    report = Report(options.rounds, options.seconds, Path(options.write).read_text() if written else "")
    with progress.status("") as status:
        say = status.update if progress.is_terminal else progress.print
        for name in options.rows or ROWS:
            result = measure(ROWS[name], options.rounds, options.seconds, say)
            report.add(result)
            console.print(report.table(result), soft_wrap=True)
            for line in remarks(result):
                console.print(f"  {line}", soft_wrap=True, markup=False)
            console.print()
            if options.write is not None:
                Path(options.write).write_text(report.markdown())


if __name__ == "__main__":
    run(main)
