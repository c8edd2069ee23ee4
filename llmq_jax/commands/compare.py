"""Compare runs: their results and speed, the options in which they differ, and a metric of all in one plot.

llmq compare runs/mine runs/dyt --out losses.png
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import Positional, default_is
from llmq_jax.errors import BadInput

LONGEST = 20  # characters of a value in the table of what differs


@dataclass(frozen=True)
class Options:
    run: Positional[str]
    """A run folder."""
    others: Annotated[Positional[tuple[str, ...]], default_is("none")] = ()
    """More run folders."""
    metric: Annotated[str | None, default_is("the loss, or what all runs are judged by")] = None
    """Metric to show and draw: any number in metrics.jsonl, such as validation_accuracy."""
    x: Annotated[Literal["step", "tokens", "seconds"] | None, default_is("step")] = None
    """Horizontal axis of the plot; seconds are those of training, without compiling, evaluation and checkpoints."""
    out: Annotated[str | None, default_is("no plot")] = None
    """PNG file to draw the plot into."""


def main(options: Options) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmq_jax.commands.tables import print_table
    from llmq_jax.training.plots import plot_comparison, read_records, run_names
    from llmq_jax.training.run_folder import what_differs

    folders = (options.run, *options.others)
    names = run_names(folders)
    if options.out is not None and Path(options.out).suffix.lower() != ".png":
        raise BadInput(f"--out {options.out}: the plot is a PNG; give it a name that ends in .png")
    if options.out is not None and not Path(options.out).parent.is_dir():
        raise BadInput(f"--out {options.out}: there is no folder {Path(options.out).parent}; make it first")
    if options.out is None and options.x is not None:
        raise BadInput("--x has no effect without --out; leave it out, or give a PNG to draw into")

    runs = {name: read_records(Path(folder)) for name, folder in zip(names, folders, strict=True)}
    judges = [judged_by(Path(folder), records) for folder, records in zip(folders, runs.values(), strict=True)]
    titles = ["training", "validation", "last", "best", "at step"]
    if options.metric is not None:
        titles = ["last", "lowest", "at step", "highest", "at step"]
    table = Table("run", box=None, header_style="bold", pad_edge=False)
    for title in ("steps", *titles, "tokens/s"):
        table.add_column(title, justify="right")
    for (name, records), judge in zip(runs.items(), judges, strict=True):
        table.add_row(*map(Text, (name, *cells(name, records, judge, options.metric))))  # brackets are no style
    if options.metric is not None:
        print(options.metric)
    print_table(table)
    if differing := what_differs(folders):
        apart = Table("differing in", box=None, header_style="bold", pad_edge=False)
        for name in names:
            apart.add_column(Text(name), justify="right")
        for option, values in differing.items():
            lines = [value.replace("\n", "\\n") for value in values]  # one row each
            cut = [value if len(value) <= LONGEST else f"{value[:LONGEST]}…" for value in lines]
            apart.add_row(option, *map(Text, cut))
        print()
        print_table(apart)
    if options.out is not None:
        means = {None if judge is None else judge[0] for judge in judges}
        (agreed,) = means if len(means) == 1 else (None,)
        metric = options.metric or (f"validation_{agreed}" if agreed not in (None, "loss") else None)
        print(f"drawn: {plot_comparison(folders, options.out, metric, options.x or 'step')}")


def judged_by(folder: Path, records: list[dict[str, Any]]) -> tuple[str, str] | None:
    """The validation metric that decides a run's best step, and whether its lowest or highest value is best, as the
    checkpoints say; without any, the loss if it was measured, else None."""
    from llmq_jax.training.checkpoints import Checkpoints

    found = Checkpoints(folder / "checkpoints").judged_by()
    return found or (("loss", "lowest") if any("validation_loss" in record for record in records) else None)


def cells(name: str, records: list[dict[str, Any]], judge: tuple[str, str] | None, metric: str | None) -> list[str]:
    """The cells of a run's row, after its name: of the given metric or, where that is None, of what the run is judged
    by."""
    import statistics

    from llmq_jax.training.plots import curve, require_metric, shown_value, training_curve

    def last(points: list[tuple[int, float]]) -> str:
        return shown_value(points[-1][1]) if points else ""

    def extreme(points: list[tuple[int, float]], pick: Callable[..., Any]) -> list[str]:
        """The extreme value, and the first step that has it."""
        if not points:
            return ["", ""]
        step, value = pick(points, key=lambda point: point[1])
        return [shown_value(value), f"{step:,}"]

    if metric is None:
        mean, best = judge or ("", "lowest")
        found = curve(records, f"validation_{mean}")
        made = [point for point in found if point[0] > 0]  # the best step is one that the run has made
        row = [last(training_curve(records)), mean, last(found), *extreme(made, min if best == "lowest" else max)]
    else:
        require_metric(name, records, metric)
        found = curve(records, metric)
        row = [last(found), *extreme(found, min), *extreme(found, max)]
    speeds = [speed for _, speed in curve(records, "tokens_per_second")]
    return [f"{records[-1]['step']:,}", *row, f"{statistics.median(speeds):,.0f}" if speeds else ""]
