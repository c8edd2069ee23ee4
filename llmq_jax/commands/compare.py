"""Compare runs: their results and speed, the options in which they differ, and a metric of all in one plot.

llmq compare runs/mine runs/dyt --out losses.png
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from llmq_jax.errors import BadInput
from llmq_jax.options import Positional, default_is

LONGEST = 20  # characters of a value in the table of what differs
SEPARATORS = " -_./="
Cell = float | int | str | None
"""A value, a count, a name, or nothing."""


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
    mean_over: Annotated[str | None, default_is("each run for itself")] = None
    """Option such as seed: runs that differ in it alone become one row and one curve, of mean and standard deviation.
    """
    out: Annotated[str | None, default_is("no plot")] = None
    """PNG file to draw the plot into."""


def main(options: Options) -> None:
    from llmq_jax.training.plots import run_names

    folders = (options.run, *options.others)
    if options.out is not None and Path(options.out).suffix.lower() != ".png":
        raise BadInput(f"--out {options.out}: the plot is a PNG; give it a name that ends in .png")
    if options.out is not None and not Path(options.out).parent.is_dir():
        raise BadInput(f"--out {options.out}: there is no folder {Path(options.out).parent}; make it first")
    if options.out is None and options.x is not None:
        raise BadInput("--x has no effect without --out; leave it out, or give a PNG to draw into")

    runs = read_runs(dict(zip(run_names(folders), map(Path, folders), strict=True)), options)
    averaged = None if options.mean_over is None else options.mean_over.replace("-", "_").removeprefix("options.")
    groups = {name: [run] for name, run in runs.items()} if averaged is None else grouped(runs, averaged)
    print_results(groups, options.metric)
    print_differences(groups, averaged)
    if options.out is not None:
        draw(groups, options.out, options.metric, options.x or "step")


class Run(NamedTuple):
    name: str
    folder: Path
    records: list[dict[str, Any]]
    judge: tuple[str, str] | None
    """What its best step is judged by, a mean of the validation or GRPO's reward, and whether the lowest or highest
    value is best."""
    row: list[Cell]
    """What stands after its name."""


Groups = dict[str, list[Run]]
"""What is one row and one curve, by its name: a run, or runs of which that shows the mean."""


def print_results(groups: Groups, metric: str | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmq_jax.commands.tables import print_table

    titles = ["training", "judged by", "validation", "best", "at step"]
    if metric is not None:
        titles = ["last", "lowest", "at step", "highest", "at step"]
        print(metric)
    table = Table("run", box=None, header_style="bold", pad_edge=False)
    for title in ("steps", *titles, "tokens/s"):
        table.add_column(title, justify="right")
    for name, runs in groups.items():
        columns = zip(*(run.row for run in runs), strict=True)
        table.add_row(*map(Text, (name, *map(text_of, columns))))  # brackets are no style
    print_table(table)


def print_differences(groups: Groups, averaged: str | None) -> None:
    """The options in which these differ, beside that which differs within them."""
    from rich.table import Table
    from rich.text import Text

    from llmq_jax.commands.tables import print_table
    from llmq_jax.training.run_config import what_differs

    table = Table("differing in", box=None, header_style="bold", pad_edge=False)
    for name in groups:
        table.add_column(Text(name), justify="right")
    for name, values in what_differs([runs[0].folder for runs in groups.values()]).items():
        if (option := name.removeprefix("options.")) != averaged:
            lines = [value.replace("\n", "\\n") for value in values]  # one row each
            cut = [value if len(value) <= LONGEST else f"{value[:LONGEST]}…" for value in lines]
            table.add_row(option, *map(Text, cut))
    if table.row_count:
        print()
        print_table(table)


def draw(groups: Groups, path: str, metric: str | None, across: str) -> None:
    from llmq_jax.training.plots import plot_comparison

    together = groups if metric is not None else drawn_together(groups)
    if left_out := [name for name in groups if name not in together]:
        why = "judged by the reward" if is_judged_by_reward(groups[left_out[0]]) else "not judged by the reward"
        names = ", ".join(left_out)
        print(f"left out of the plot, as {why}: {names}; give a --metric to draw all", file=sys.stderr)
    metric = metric or common_metric([run for runs in together.values() for run in runs])
    folders = {name: [run.folder for run in runs] for name, runs in together.items()}
    print(f"drawn: {plot_comparison(folders, path, metric, across)}")


def read_runs(folders: dict[str, Path], options: Options) -> dict[str, Run]:
    """The runs by name. Those that are damaged, or have not yet measured what is asked for, and folders that are no
    run's, are told of and left out. BadInput where none is left, and for a folder that is not there."""
    from llmq_jax.training.plots import positions, read_records, require_metric
    from llmq_jax.training.run_config import CONFIG
    from llmq_jax.training.run_folder import FINISHED

    runs: dict[str, Run] = {}
    faults: list[BadInput] = []
    for name, folder in folders.items():
        try:
            records = read_records(folder)
            if options.metric is not None:
                require_metric(name, records, options.metric)
            positions(name, records, options.x or "step")  # which refuses records without this axis
            judge = judged_by(folder, records)
            row = row_of(records, judge, options.metric)
        except BadInput as fault:
            if not folder.exists():
                raise
            faults.append(fault)
        else:
            runs[name] = Run(name, folder, records, judge, row)
    if not runs:
        raise faults[0]
    for left_out in faults:
        print(f"left out: {left_out}", file=sys.stderr)
    for name, run in runs.items():
        if (run.folder / CONFIG).is_file() and not (run.folder / FINISHED).is_file():
            print(f"not finished (stopped, or still training): {name}, at step {run.row[0]:,}", file=sys.stderr)
    return runs


def judged_by(folder: Path, records: list[dict[str, Any]]) -> tuple[str, str] | None:
    """`Run.judge`: what the checkpoints say if that was measured; else the reward or the validation loss if it was."""
    from llmq_jax.training.checkpoints import CHECKPOINTS, Checkpoints
    from llmq_jax.training.metrics import VALIDATION
    from llmq_jax.training.plots import curve, is_rewarded

    found = Checkpoints(folder / CHECKPOINTS).judged_by()
    if is_rewarded(records) and not (found and curve(records, VALIDATION + found[0])):
        return "reward", "highest"
    if found is not None:
        return found
    return ("loss", "lowest") if curve(records, "validation_loss") else None


def is_judged_by_reward(runs: list[Run]) -> bool:
    return any(run.judge is not None and run.judge[0] == "reward" for run in runs)


def drawn_together(groups: Groups) -> Groups:
    """What to draw where no metric is given. Of rewards and losses, which share no axis, those that more of these have;
    of as many, those of the first."""
    rewarded = [is_judged_by_reward(runs) for runs in groups.values()]
    drawn = max(rewarded, key=rewarded.count)
    return {name: runs for name, runs in groups.items() if is_judged_by_reward(runs) == drawn}


def common_metric(runs: list[Run]) -> str | None:
    """What to draw: what all runs are judged by, of validation or else of training; None: their losses."""
    from llmq_jax.training.metrics import VALIDATION
    from llmq_jax.training.plots import curve

    judges = {run.judge for run in runs}
    (judge,) = judges if len(judges) == 1 else (None,)
    names = () if judge is None or judge[0] == "loss" else (VALIDATION + judge[0], judge[0])
    return next((name for name in names if all(curve(run.records, name) for run in runs)), None)


def row_of(records: list[dict[str, Any]], judge: tuple[str, str] | None, metric: str | None) -> list[Cell]:
    """`Run.row`: of the given metric or, where that is None, of what the run is judged by."""
    from llmq_jax.training.metrics import OWN_LOSSES, VALIDATION, figure
    from llmq_jax.training.plots import curve

    def last(*names: str) -> Cell:
        """The last value of the first of these that there is; nan where that was not finite, which is null in files."""
        for name in names:
            if having := [record for record in records if name in record]:
                value = figure(having[-1], name)
                return math.nan if value is None else value
        return None

    def extreme(points: list[tuple[int, float]], pick: Callable[..., Any]) -> list[Cell]:
        """The extreme value, and the first step that has it."""
        if not points:
            return [None, None]
        step, value = pick(points, key=lambda point: point[1])
        return [float(value), step]

    if metric is None:
        mean, best = judge or ("", "lowest")
        found = curve(records, VALIDATION + mean)
        made = [point for point in found if point[0] > 0]  # the best step is one that the run has made
        trained = last("reward") if mean == "reward" else last(*OWN_LOSSES, "loss")  # GRPO's loss is about 0
        row = [trained, mean, last(VALIDATION + mean), *extreme(made, min if best == "lowest" else max)]
    else:
        found = curve(records, metric)
        row = [last(metric), *extreme(found, min), *extreme(found, max)]
    speeds = [speed for _, speed in curve(records, "tokens_per_second")]
    return [records[-1]["step"], *row, round(statistics.median(speeds)) if speeds else None]


def text_of(cells: Sequence[Cell]) -> str:
    """What one run has in a column, or several: of steps the range, of values the mean and the sample standard
    deviation; nothing where one of them has none. What some are judged by stands for all."""
    from llmq_jax.training.plots import shown_value

    values, counts = [[cell for cell in cells if isinstance(cell, kind)] for kind in (float, int)]
    if len(values) == len(cells):
        finite = len(values) > 1 and all(map(math.isfinite, values))
        return shown_value(statistics.fmean(values), statistics.stdev(values) if finite else None)
    if len(counts) == len(cells):
        return "–".join(f"{end:,}" for end in sorted({min(counts), max(counts)}))
    return ", ".join(dict.fromkeys(cell for cell in cells if isinstance(cell, str) and cell))


def grouped(runs: dict[str, Run], option: str) -> Groups:
    """The runs that differ in this option alone, by a name for them all."""
    from llmq_jax.training.run_config import alike_but_for

    of_folder = {run.folder: run for run in runs.values()}
    groups = [[of_folder[folder] for folder in group] for group in alike_but_for(option, list(of_folder))]
    names = [[run.name for run in group] for group in groups]
    short = [common_name(group, option) for group in names]
    distinct = short if len({*short}) == len(short) else [", ".join(group) for group in names]
    return dict(zip(distinct, groups, strict=True))


def common_name(names: list[str], option: str) -> str:
    """ "base (2 runs)" for base-1 and base-2, or base-seed1 and base-seed2 where `seed` is the option."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda characters: len({*characters}) == 1, zip(*names, strict=False))
    common = "".join(characters[0] for characters in alike)
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")  # seed-1 and seed-12 have more in common than a name
    common = common.rstrip(SEPARATORS).removesuffix(option).rstrip(SEPARATORS)
    return f"{common} ({len(names)} runs)" if common else ", ".join(names)
