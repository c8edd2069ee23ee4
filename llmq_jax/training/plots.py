"""Loss curves as PNG: of one run, and of several beside one another."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq_jax.atomic_files import write_atomically
from llmq_jax.errors import BadInput
from llmq_jax.training.metrics import METRICS, Record, figure, read_metrics, shown_loss

TRAINING, VALIDATION, INK = "#7aa6d6", "#d1495b", "#333333"
RUN_COLOURS = ("#2f6fb0", "#d1495b", "#3a9d6e", "#8a5fbf", "#d98f2b", "#4f9fb5", "#8c6d5a", "#777777")

Points = list[tuple[int, float]]


def plot_losses(folder: str | Path) -> Path:
    """Draw training and validation loss of the run in `folder` over steps (below) and tokens seen (above) as
    `losses.png`, from metrics.jsonl."""
    folder = Path(folder)
    records = read_run(folder)
    training, validation = training_curve(records), curve(records, "validation_loss")

    figure, axes = blank_axes(folder.absolute().name, [records])
    if training:
        axes.plot(*zip(*training, strict=True), color=TRAINING, linewidth=1.2, label=_label("training", training))
    if validation:
        _draw(axes, validation, VALIDATION, "validation")
    legend(axes)
    return save_figure(figure, folder / "losses.png")


def plot_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the validation losses of several runs over steps as `path`; the training losses where one has no other."""
    runs = dict(zip(run_names(folders), (read_run(Path(folder)) for folder in folders), strict=True))
    validated = all(curve(records, "validation_loss") for records in runs.values())
    figure, axes = blank_axes("validation loss" if validated else "training loss", list(runs.values()))
    for index, (name, records) in enumerate(runs.items()):
        points = curve(records, "validation_loss") if validated else training_curve(records)
        if not points:
            raise BadInput(f"{name} has validation losses alone, and others have none: there is nothing to compare")
        _draw(axes, points, RUN_COLOURS[index % len(RUN_COLOURS)], name)
    legend(axes)
    return save_figure(figure, path)


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names, with as many of those above them as tell them apart. BadInput: one is given twice."""
    paths = [Path(folder).absolute() for folder in folders]
    names = []
    for path in paths:
        if paths.count(path) > 1:
            raise BadInput(f"{path} is given twice; name each run once")
        lengths = range(1, len(path.parts) + 1)
        alike = (sum(other.parts[-n:] == path.parts[-n:] for other in paths) for n in lengths)
        names.append("/".join(path.parts[-next(n for n, count in zip(lengths, alike, strict=True) if count == 1) :]))
    return names


def plot_panels(folder: str | Path, panels: Sequence[tuple[str, Sequence[str]]]) -> Path:
    """Draw metrics of the run in `folder` over steps as `curves.png`: panels of (title, names of metrics), of which
    those that the run has not measured are left out."""
    folder = Path(folder)
    records = read_metrics(folder / METRICS)
    found = [(title, {name: points for name in names if (points := curve(records, name))}) for title, names in panels]
    return save_figure(draw_panels([(title, curves) for title, curves in found if curves]), folder / "curves.png")


def draw_panels(panels: Sequence[tuple[str, dict[str, Points]]], columns: int = 2) -> Any:
    """A figure of panels of (title, curves by name); a curve that is named by the title needs no legend."""
    from matplotlib.ticker import MaxNLocator

    rows = max(1, -(-len(panels) // columns))
    figure = blank_figure((10.0, 5.2 / columns * rows))
    for index, (title, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold", parse_math=False)
        for colour, (name, points) in zip(RUN_COLOURS, curves.items(), strict=False):
            _draw(axes, points, colour, name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["right", "top"]].set_visible(False)
        if list(curves) != [title]:
            legend(axes, fontsize=8)
    return figure


def read_run(folder: Path) -> list[Record]:
    """The metrics of a run; BadInput where there are none."""
    if not (folder / METRICS).is_file():
        raise BadInput(f"no {METRICS} in {folder}; give the folder of a run")
    records = read_metrics(folder / METRICS)
    if not curve(records, "loss") and not curve(records, "validation_loss"):
        raise BadInput(f"{folder / METRICS} has no losses yet; train for some steps first")
    return records


def curve(records: list[Record], name: str) -> Points:
    return [(record["step"], value) for record in records if (value := figure(record, name)) is not None]


def training_curve(records: list[Record]) -> Points:
    """The training losses, as they are shown."""
    return [(record["step"], loss) for record in records if (loss := shown_loss(record)) is not None]


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write the figure as a whole: in the format of the file's name."""
    path, image = Path(path), io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix(".") or "png")
    write_atomically(path, image.getvalue())
    return path


def legend(axes: Any, **style: Any) -> None:
    """Of the curves, by names in which a dollar begins no formula."""
    for text in axes.legend(frameon=False, **style).get_texts():
        text.set_parse_math(False)


def blank_figure(size: tuple[float, float] = (8, 4.8)) -> Any:
    # The object interface alone: pyplot would keep global state and may start a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # On a machine's first plot it announces that it lists the fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def blank_axes(title: str, runs: list[list[Record]]) -> tuple[Any, Any]:
    """An empty figure for losses over steps, with tokens seen above where they are the same in all runs."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = blank_figure()
    axes = figure.add_subplot()
    axes.set_xlabel("steps", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.set_title(title, loc="left", color=INK, fontweight="bold", parse_math=False)
    axes.set_xlim(left=0, right=max(record["step"] for records in runs for record in records))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["right"]].set_visible(False)

    # Batches are alike, so tokens seen grow evenly with steps; exact at the last one.
    per_step = {records[-1]["tokens"] / records[-1]["step"] if records[-1].get("tokens") else None for records in runs}
    rate = per_step.pop()
    if rate and not per_step:
        top = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        top.set_xlabel("tokens seen", color=INK)
        top.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.spines[["top"]].set_visible(False)
    return figure, axes


def _draw(axes: Any, points: Points, colour: str, name: str) -> None:
    marker = "o" if len(points) <= 50 else None
    label = _label(name, points)
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, marker=marker, markersize=4, label=label)


def _label(name: str, points: Points) -> str:
    return f"{shown(name)}, {points[-1][1]:.4f} at step {points[-1][0]:,}"


def shown(name: str) -> str:
    """A name for a legend, which leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name
