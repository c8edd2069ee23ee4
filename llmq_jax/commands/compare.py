"""Compare runs: losses and speed, the options in which they differ, their validation losses in one plot.

llmq compare runs/mine runs/dyt --out losses.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmq_jax.command_line import Positional, default_is
from llmq_jax.errors import BadInput

LONGEST = 20  # characters of a value in the table of what differs


@dataclass(frozen=True)
class Options:
    run: Positional[str]
    """A run folder."""
    others: Annotated[Positional[tuple[str, ...]], default_is("none")] = ()
    """More run folders."""
    out: Annotated[str | None, default_is("no plot")] = None
    """PNG to draw the losses into."""


def main(options: Options) -> None:
    import statistics

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmq_jax.training.plots import curve, plot_comparison, read_run, run_names, training_curve
    from llmq_jax.training.run_folder import what_differs

    runs = (options.run, *options.others)
    names = run_names(runs)
    if options.out is not None and Path(options.out).suffix.lower() != ".png":
        raise BadInput(f"--out {options.out}: the plot is a PNG; give it a name that ends in .png")
    if options.out is not None and not Path(options.out).parent.is_dir():
        raise BadInput(f"--out {options.out}: there is no folder {Path(options.out).parent}; make it first")

    table = Table("run", box=None, header_style="bold", pad_edge=False)
    for title in ("steps", "training loss", "validation", "lowest", "at step", "tokens/s"):
        table.add_column(title, justify="right")
    for name, run in zip(names, runs, strict=True):
        records = read_run(Path(run))
        training, validation = training_curve(records), curve(records, "validation_loss")
        at_step, lowest = min(validation, key=lambda point: point[1], default=(None, None))
        speeds = [speed for _, speed in curve(records, "tokens_per_second")]
        table.add_row(
            Text(name),  # in which brackets are no style
            f"{records[-1]['step']:,}",
            _number(training[-1][1] if training else None),
            _number(validation[-1][1] if validation else None),
            _number(lowest),
            "" if at_step is None else f"{at_step:,}",
            f"{statistics.median(speeds):,.0f}" if speeds else "",
        )
    Console().print(table)
    if differing := what_differs(runs):
        apart = Table("differing in", box=None, header_style="bold", pad_edge=False)
        for name in names:
            apart.add_column(Text(name), justify="right")
        for option, values in differing.items():
            cut = [value if len(value) <= LONGEST else f"{value[:LONGEST]}…" for value in values]
            apart.add_row(option, *map(Text, cut))
        print()
        Console().print(apart)
    if options.out is not None:
        print(f"drawn: {plot_comparison(runs, options.out)}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
