"""Compare runs: their results and speed, the options in which they differ, and a metric of all in one plot.

llmq compare runs/mine runs/dyt --out losses.png
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from llmq_jax.errors import BadInput
from llmq_jax.options import Positional, default_is

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
    from llmq_jax.training.plots import plot_comparison, run_names
    from llmq_jax.training.run_folder import what_differs

    folders = (options.run, *options.others)
    if options.out is not None and Path(options.out).suffix.lower() != ".png":
        raise BadInput(f"--out {options.out}: the plot is a PNG; give it a name that ends in .png")
    if options.out is not None and not Path(options.out).parent.is_dir():
        raise BadInput(f"--out {options.out}: there is no folder {Path(options.out).parent}; make it first")
    if options.out is None and options.x is not None:
        raise BadInput("--x has no effect without --out; leave it out, or give a PNG to draw into")

    runs = read_runs(dict(zip(run_names(folders), map(Path, folders), strict=True)), options)
    titles = ["training", "judged by", "validation", "best", "at step"]
    if options.metric is not None:
        titles = ["last", "lowest", "at step", "highest", "at step"]
    table = Table("run", box=None, header_style="bold", pad_edge=False)
    for title in ("steps", *titles, "tokens/s"):
        table.add_column(title, justify="right")
    for name, run in runs.items():
        table.add_row(*map(Text, (name, *run.cells)))  # brackets are no style
    if options.metric is not None:
        print(options.metric)
    print_table(table)
    if differing := what_differs([run.folder for run in runs.values()]):
        apart = Table("differing in", box=None, header_style="bold", pad_edge=False)
        for name in runs:
            apart.add_column(Text(name), justify="right")
        for option, values in differing.items():
            lines = [value.replace("\n", "\\n") for value in values]  # one row each
            cut = [value if len(value) <= LONGEST else f"{value[:LONGEST]}…" for value in lines]
            apart.add_row(option.removeprefix("options."), *map(Text, cut))
        print()
        print_table(apart)
    if options.out is not None:
        together = runs if options.metric is not None else drawn_together(runs)
        if left_out := [name for name in runs if name not in together]:
            why = "judged by the reward" if is_judged_by_reward(runs[left_out[0]]) else "not judged by the reward"
            names = ", ".join(left_out)
            print(f"left out of the plot, as {why}: {names}; give a --metric to draw all", file=sys.stderr)
        metric = options.metric or common_metric(list(together.values()))
        drawn = {name: run.folder for name, run in together.items()}
        print(f"drawn: {plot_comparison(drawn, options.out, metric, options.x or 'step')}")


class Run(NamedTuple):
    folder: Path
    records: list[dict[str, Any]]
    judge: tuple[str, str] | None
    """What its best step is judged by, a mean of the validation or GRPO's reward, and whether the lowest or highest
    value is best."""
    cells: list[str]
    """Those of its row, after its name."""


def read_runs(folders: dict[str, Path], options: Options) -> dict[str, Run]:
    """The runs by name. Those that are damaged, or have not yet measured what is asked for, and folders that are no
    run's, are told of and left out. BadInput where none is left, and for a folder that is not there."""
    from llmq_jax.training.plots import positions, read_records, require_metric

    runs: dict[str, Run] = {}
    faults: list[BadInput] = []
    for name, folder in folders.items():
        try:
            records = read_records(folder)
            if options.metric is not None:
                require_metric(name, records, options.metric)
            positions(name, records, options.x or "step")  # which refuses records without this axis
            judge = judged_by(folder, records)
            row = cells(records, judge, options.metric)
        except BadInput as fault:
            if not folder.exists():
                raise
            faults.append(fault)
        else:
            runs[name] = Run(folder, records, judge, row)
    if not runs:
        raise faults[0]
    for left_out in faults:
        print(f"left out: {left_out}", file=sys.stderr)
    return runs


def judged_by(folder: Path, records: list[dict[str, Any]]) -> tuple[str, str] | None:
    """`Run.judge`, as the checkpoints say; without any, the reward or else the validation loss if it was measured."""
    from llmq_jax.training.checkpoints import CHECKPOINTS, Checkpoints
    from llmq_jax.training.plots import curve, is_rewarded

    if (found := Checkpoints(folder / CHECKPOINTS).judged_by()) is not None:
        return found
    if is_rewarded(records):
        return "reward", "highest"
    return ("loss", "lowest") if curve(records, "validation_loss") else None


def is_judged_by_reward(run: Run) -> bool:
    return run.judge is not None and run.judge[0] == "reward"


def drawn_together(runs: dict[str, Run]) -> dict[str, Run]:
    """The runs to draw where no metric is given. Of rewards and losses, which share no axis, those that more runs have;
    of as many, those of the first run."""
    rewarded = [is_judged_by_reward(run) for run in runs.values()]
    drawn = max(rewarded, key=rewarded.count)
    return {name: run for name, run in runs.items() if is_judged_by_reward(run) == drawn}


def common_metric(runs: list[Run]) -> str | None:
    """What to draw: what all runs are judged by, of validation or else of training; None: their losses."""
    from llmq_jax.training.metrics import VALIDATION
    from llmq_jax.training.plots import curve

    judges = {run.judge for run in runs}
    (judge,) = judges if len(judges) == 1 else (None,)
    names = () if judge is None or judge[0] == "loss" else (VALIDATION + judge[0], judge[0])
    return next((name for name in names if all(curve(run.records, name) for run in runs)), None)


def cells(records: list[dict[str, Any]], judge: tuple[str, str] | None, metric: str | None) -> list[str]:
    """`Run.cells`: of the given metric or, where that is None, of what the run is judged by."""
    import statistics

    from llmq_jax.training.metrics import VALIDATION
    from llmq_jax.training.plots import curve, shown_value, training_curve

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
        found = curve(records, VALIDATION + mean)
        made = [point for point in found if point[0] > 0]  # the best step is one that the run has made
        trained = curve(records, "reward") if mean == "reward" else training_curve(records)  # GRPO's loss is about 0
        row = [last(trained), mean, last(found), *extreme(made, min if best == "lowest" else max)]
    else:
        found = curve(records, metric)
        row = [last(found), *extreme(found, min), *extreme(found, max)]
    speeds = [speed for _, speed in curve(records, "tokens_per_second")]
    return [f"{records[-1]['step']:,}", *row, f"{statistics.median(speeds):,.0f}" if speeds else ""]
