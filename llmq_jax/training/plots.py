"""The loss curves of a run as a PNG."""

import logging
from pathlib import Path

from llmq_jax.errors import BadInput
from llmq_jax.training.metrics import METRICS, read_metrics

TRAINING, VALIDATION, INK = "#7aa6d6", "#d1495b", "#333333"


def plot_losses(folder: str | Path) -> Path:
    """Draw training and validation loss of the run in `folder` over steps (below) and tokens seen (above) as
    `losses.png`, from metrics.jsonl."""
    # The object interface alone: pyplot would keep global state and may start a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    # On a machine's first plot it announces that it lists the fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    folder = Path(folder)
    if not (folder / METRICS).is_file():
        raise BadInput(f"no {METRICS} in {folder}; give the folder of a run")
    records = read_metrics(folder / METRICS)
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    if not training and not validation:
        raise BadInput(f"{folder / METRICS} has no losses yet; train for some steps first")

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), color=TRAINING, linewidth=1.2, label=_label("training", training))
    if validation:
        marker = "o" if len(validation) <= 50 else None
        label = _label("validation", validation)
        axes.plot(
            *zip(*validation, strict=True), color=VALIDATION, linewidth=2, marker=marker, markersize=4, label=label
        )
    axes.set_xlabel("steps", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.set_title(folder.absolute().name, loc="left", color=INK, fontweight="bold")
    axes.set_xlim(left=0, right=max(r["step"] for r in records))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["right"]].set_visible(False)
    axes.legend(frameon=False)

    if tokens := records[-1].get("tokens"):
        # Batches are alike, so tokens seen grow evenly with steps; exact at the last one.
        per_step = tokens / records[-1]["step"]
        top = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
        top.set_xlabel("tokens seen", color=INK)
        top.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.spines[["top"]].set_visible(False)
    path = folder / "losses.png"
    figure.savefig(path)
    return path


def _label(name: str, points: list[tuple[int, float]]) -> str:
    return f"{name}, {points[-1][1]:.4f} at step {points[-1][0]:,}"
