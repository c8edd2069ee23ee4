"""What runs learned as PNG: of one, its losses or GRPO's rewards, and of several beside one another."""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llmq_jax.atomic_files import write_atomically
from llmq_jax.errors import BadInput, no_such_path
from llmq_jax.training.metrics import METRICS, Record, figure, read_metrics, shown_loss
from llmq_jax.training.run_config import CONFIG, read_run_config, run_below

TRAINING, VALIDATION, INK = "#7aa6d6", "#d1495b", "#333333"
RUN_COLOURS = ("#2f6fb0", "#d1495b", "#3a9d6e", "#8a5fbf", "#d98f2b", "#4f9fb5", "#8c6d5a", "#777777")

DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))
"""Of one curve after another, so that of two that are equal the lower one is seen between the dashes of the upper."""

Point = tuple[int, float]
"""(step, value)"""
Points = list[Point]
TITLE_POINTS = 870
"""The font size in which a title of one character would fill all columns of panels."""
ACROSS = {"step": "steps", "tokens": "tokens seen", "seconds": "seconds of training"}
"""{what curves may be drawn over: the label of that axis}"""
LOSS_UNITS = {
    "train.pretrain": "nats a token",
    "train.instruct": "nats a token",
    "train.classifier": "nats a text",
    "train.reward": "nats a pair",
}
"""{recipe: unit of its loss, where all options have the same}. The losses of IPO and GRPO have no unit."""
REWARDS = (
    ("reward", ("reward", "validation_reward")),
    ("spread of rewards within a group", ("reward_std",)),
    ("answers, tokens", ("completions/mean_length", "completions/mean_terminated_length")),
    ("shares", ("frac_reward_zero_std", "completions/clipped_ratio")),
    ("entropy, KL to the reference", ("entropy", "kl")),
    ("clipped share of tokens", ("clip_ratio/low_mean", "clip_ratio/high_mean")),
)
"""Panels of a run that learns from rewards: title and metrics of each."""


def plot_losses(folder: str | Path) -> Path:
    """Draw training and validation loss of the run in `folder` over steps (below) and tokens seen (above) as
    `losses.png`, from metrics.jsonl."""
    return save_figure(draw_losses(folder), Path(folder) / "losses.png")


def draw_losses(folder: str | Path) -> Any:
    """The figure of `plot_losses`."""
    folder = Path(folder)
    records = read_run(folder)
    training, validation = training_curve(records), curve(records, "validation_loss")

    figure, axes = blank_axes(folder.absolute().name, [records])
    axes.set_ylabel(_loss_with_unit([folder]), color=INK)
    if training:
        label = _label("training", training)
        axes.plot(*zip(*training, strict=True), color=TRAINING, linewidth=1.2, label=label, clip_on=False)
    if validation:
        _draw(axes, validation, VALIDATION, "validation")
    legend(axes)
    return figure


def plot_rewards(folder: str | Path) -> Path:
    """Draw what the run in `folder` has measured of `REWARDS` over steps as `curves.png`, from metrics.jsonl."""
    return save_figure(draw_rewards(folder), Path(folder) / "curves.png")


def draw_rewards(folder: str | Path) -> Any:
    """The figure of `plot_rewards`."""
    records = read_records(Path(folder))
    found = [(title, {name: points for name in names if (points := curve(records, name))}) for title, names in REWARDS]
    return draw_panels([(title, curves) for title, curves in found if curves])


def is_rewarded(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are of a run that learns from rewards, as GRPO, whose loss is about 0 whatever the policy."""
    return any(record.get(name) is not None for record in records for name in ("reward", "validation_reward"))


def plot_comparison(
    folders: Mapping[str, Sequence[str | Path]], path: str | Path, metric: str | None = None, across: str = "step"
) -> Path:
    """Draw a metric of several runs as `path`, over steps, tokens or seconds (`ACROSS`). `folders` are {name: [folder]}
    or, to draw the mean of runs and their standard deviation as a band, {name: folders}. The metric None is the
    validation losses, or the training losses where a run has no other."""
    groups = {name: [read_records(Path(folder)) for folder in group] for name, group in folders.items()}
    runs = list(chain(*groups.values()))
    validated = all(curve(records, "validation_loss") for records in runs)
    name = "validation_loss" if metric is None and validated else metric
    title = metric or ("validation loss" if validated else "training loss")
    drawn, axes = blank_axes(title, runs, across)
    axes.set_ylabel(metric or _loss_with_unit(chain(*folders.values())), color=INK, parse_math=False)
    for index, (run, group) in enumerate(groups.items()):
        curves = []
        for records in group:
            if metric is not None:
                require_metric(run, records, metric)
            values = [shown_loss(record) if name is None else figure(record, name) for record in records]
            at = positions(run, records, across)
            measured = zip(records, at, values, strict=True)
            curves.append({record["step"]: (x, value) for record, x, value in measured if value is not None})
            if not curves[-1]:
                raise BadInput(
                    f"{run} has no training losses, and one of the others no validation losses: there is nothing to "
                    "compare; name a metric that all have"
                )
        _draw_mean(axes, curves, RUN_COLOURS[index % len(RUN_COLOURS)], run, index)
    if across != "step":  # over steps, blank_axes has set the limits
        axes.set_xlim(left=0)
    legend(axes)
    return save_figure(drawn, path)


def _loss_with_unit(folders: Iterable[str | Path]) -> str:
    """The label of the axis of losses, with their unit where it is known and the same in all runs."""
    units = {LOSS_UNITS.get(str((read_run_config(Path(folder) / CONFIG) or {}).get("recipe"))) for folder in folders}
    unit = units.pop()
    return f"loss ({unit})" if unit and not units else "loss"


def require_metric(run: str, records: list[Record], metric: str) -> None:
    """BadInput where the records of this run have no such figure."""
    numbers = ((name, value) for record in records for name, value in record.items() if name != "step")
    known = dict.fromkeys(name for name, value in numbers if isinstance(value, int | float))
    if metric not in known:
        raise BadInput(f"{run} has no {metric!r} in its {METRICS}; choose from {', '.join(known)}")


def positions(run: str, records: list[Record], across: str) -> list[float]:
    """Where each record stands on an axis of `ACROSS`. BadInput where the records of this run do not tell."""
    if across == "step":
        return [float(record["step"]) for record in records]
    if not all("tokens" in record for record in records):
        raise BadInput(f"{run} has no tokens in its {METRICS}; draw it over steps")
    tokens = [float(record["tokens"]) for record in records]
    if across == "tokens":
        return tokens
    # A record's speed is that since the record before, without compiling, evaluation and checkpoints. Where a run was
    # resumed in between, it is also taken for the steps before, whose time was lost with their process.
    seen, seconds, speed = [0.0], [0.0], 0.0
    for count, record in zip(tokens, records, strict=True):
        if measured := figure(record, "tokens_per_second"):
            speed = measured
            seconds.append(seconds[-1] + (count - seen[-1]) / speed)
            seen.append(count)
    if not speed:
        raise BadInput(f"{run} has no tokens_per_second in its {METRICS}; draw it over steps or tokens")
    beyond = [max(0.0, count - seen[-1]) / speed for count in tokens]
    return [float(np.interp(count, seen, seconds)) + more for count, more in zip(tokens, beyond, strict=True)]


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names, with as many parent folders as tell them apart. BadInput: one is given twice."""
    paths = [Path(folder).absolute() for folder in folders]
    names = []
    for path in paths:
        if paths.count(path) > 1:
            raise BadInput(f"{path} is given twice; name each run once")
        lengths = range(1, len(path.parts) + 1)
        alike = (sum(other.parts[-n:] == path.parts[-n:] for other in paths) for n in lengths)
        names.append("/".join(path.parts[-next(n for n, count in zip(lengths, alike, strict=True) if count == 1) :]))
    return names


def draw_panels(panels: Sequence[tuple[str, dict[str, Points]]], columns: int = 2) -> Any:
    """A figure of panels of (title, curves by name); a curve that is named by the title needs no legend."""
    from matplotlib.ticker import MaxNLocator

    rows = max(1, -(-len(panels) // columns))
    figure = blank_figure((10.0, 5.2 / columns * rows))
    for index, (title, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        size = min(10.0, TITLE_POINTS / columns / max(1, len(title)))  # a long one must not run out of the figure
        axes.set_title(title, loc="left", color=INK, fontsize=size, fontweight="bold", parse_math=False)
        for number, (colour, (name, points)) in enumerate(zip(RUN_COLOURS, curves.items(), strict=False)):
            _draw(axes, points, colour, name, number=number)
        axes.xaxis.set_major_locator(MaxNLocator(12 // columns, integer=True))  # their numbers stand side by side
        axes.ticklabel_format(axis="y", useOffset=False)
        if index + columns >= len(panels):
            axes.set_xlabel(ACROSS["step"], color=INK)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["right", "top"]].set_visible(False)
        if list(curves) != [title]:
            legend(axes, fontsize=8)
    return figure


def read_records(folder: Path) -> list[Record]:
    """The metrics of a run; BadInput where there are none."""
    if not folder.exists():
        raise BadInput(no_such_path(folder))
    measured = (folder / METRICS).is_file()
    if not measured and read_run_config(folder / CONFIG) is None:
        raise BadInput(f"no {METRICS} in {folder}; give the folder of a run{run_below(folder)}")
    records = read_metrics(folder / METRICS) if measured else []
    if not records:
        raise BadInput(f"{folder / METRICS} has no records yet; train for some steps first")
    return records


def read_run(folder: Path) -> list[Record]:
    """The metrics of a run that has losses; BadInput where there are none."""
    records = read_records(folder)
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
    """Add a legend of the curves; a dollar in a name begins no formula."""
    for text in axes.legend(facecolor="white", edgecolor="none", **style).get_texts():
        text.set_parse_math(False)


def blank_figure(size: tuple[float, float] = (8, 4.8)) -> Any:
    # The object interface alone: pyplot would keep global state and may start a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # On a machine's first plot matplotlib announces that it lists the fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def fonts_with(text: str) -> tuple[list[str], str]:
    """(families of fonts to draw the text in: matplotlib's default and, for what that lacks, others that are installed;
    the characters that none of them has)."""
    from matplotlib import font_manager

    def without(lacking: set[str], file: str) -> set[str]:
        font = font_manager.get_font(file)
        return {character for character in lacking if not font.get_char_index(ord(character))}

    families = ["sans-serif"]
    lacking = without(set(text), font_manager.findfont(font_manager.FontProperties()))
    for family in dict.fromkeys(font.name for font in font_manager.fontManager.ttflist):
        if not lacking:
            break
        if family.startswith("Last Resort"):  # has a box for every character
            continue
        try:  # the style that is drawn may have other characters than the family's others
            drawn = font_manager.findfont(font_manager.FontProperties(family=family), fallback_to_default=False)
            still = without(lacking, drawn)
        except (OSError, RuntimeError, ValueError):  # matplotlib's list is older than the folders of fonts
            continue
        if len(still) < len(lacking):
            families, lacking = [*families, family], still
    return families, "".join(sorted(lacking))


def blank_axes(title: str, runs: list[list[Record]], across: str = "step") -> tuple[Any, Any]:
    """An empty figure for losses; over steps, with tokens seen above where they are the same in all runs."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = blank_figure()
    axes = figure.add_subplot()
    axes.set_xlabel(ACROSS[across], color=INK)
    axes.set_title(title, loc="left", color=INK, fontweight="bold", parse_math=False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["right"]].set_visible(False)
    if across != "step":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top"]].set_visible(False)
        return figure, axes
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0, right=max(1, *(record["step"] for records in runs for record in records)))

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


def _draw_mean(axes: Any, curves: list[dict[int, tuple[float, float]]], colour: str, name: str, number: int) -> None:
    """The mean of curves of {step: (where it is drawn, value)} at the steps that all have, and their sample standard
    deviation as a band around it."""
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    if not steps:
        raise BadInput(f"{name}: measured at no step in common, so that they have no mean")
    at, values = np.moveaxis(np.array([[curve[step] for step in steps] for curve in curves]), -1, 0)
    spread = None if len(curves) == 1 else values.std(0, ddof=1)
    _draw(axes, list(zip(steps, values.mean(0), strict=True)), colour, name, at.mean(0), number, spread)


def _draw(
    axes: Any,
    points: Points,
    colour: str,
    name: str,
    at: Sequence[float] | np.ndarray | None = None,
    number: int = 0,
    spread: np.ndarray | None = None,
) -> None:
    """A curve of (step, value), over its steps unless `at` says where each is drawn; `number` counts curves that may
    lie on one another; `spread` is half the height of a band around it."""
    marker = "o" if len(points) <= 50 else None
    steps, values = zip(*points, strict=True)
    style: dict[str, Any] = {"color": colour, "linewidth": 2, "linestyle": DASHES[number % len(DASHES)]}
    style |= {"marker": marker, "markersize": 4}
    at, label = steps if at is None else at, _label(name, points, None if spread is None else spread[-1])
    # The first point and the last stand on the edges of the axes, which would cut them in halves.
    axes.plot(at, values, label=label, clip_on=False, **style)
    if spread is not None:
        axes.fill_between(at, np.subtract(values, spread), np.add(values, spread), color=colour, alpha=0.2, linewidth=0)


def _label(name: str, points: Points, spread: float | None = None) -> str:
    return f"{shown(name)}, {shown_value(points[-1][1], spread)} at step {points[-1][0]:,}"


def shown_value(value: float, spread: float | None = None) -> str:
    """Four places, or as many as a small number needs; then a standard deviation, if there is one."""
    text = f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3g}"
    return text if spread is None else f"{text} ± {spread:.2g}"


def shown(name: str) -> str:
    """A name for a legend, which leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name
