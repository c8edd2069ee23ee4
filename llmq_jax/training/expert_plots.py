"""How evenly experts were loaded, as PNG: heat maps (layers by experts), and the largest violation over steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.training.metrics import Record
from llmq_jax.training.plots import (
    INK,
    RUN_COLOURS,
    blank_axes,
    blank_figure,
    curve,
    legend,
    read_run,
    save_figure,
    shown,
)

# A heat map shows the mean over this part of the records, the last ones.
LAST_PART = 0.2


def plot_expert_load(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the load of every expert in every layer, as a multiple of the mean, for several runs side by side."""
    loads: dict[str, np.ndarray] = {}
    for folder in folders:
        name, load = Path(folder).absolute().name, mean_load(read_run(Path(folder)))
        if load is None:
            raise BadInput(f"the run {name} has no expert_load in its metrics; give runs of models with experts")
        loads[name] = load
    layers, experts = map(max, zip(*(load.shape for load in loads.values()), strict=True))
    width = max(3.2, 0.28 * experts + 1.2)
    figure = blank_figure((width * len(loads) + 0.8, max(2.6, 0.3 * layers + 1.6)))
    panels = figure.subplots(1, len(loads), squeeze=False)[0]
    for axes, (name, load) in zip(panels, loads.items(), strict=True):
        # 2 is twice the mean; what is above it is drawn as 2.
        image = axes.imshow(load, vmin=0.0, vmax=2.0, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        title = f"{name}\nfullest {load.max():.1f} times the mean"
        axes.set_title(title, loc="left", color=INK, fontsize=9, parse_math=False)
        axes.set_xlabel("expert", color=INK)
        axes.set_xticks(np.arange(0, load.shape[1], max(1, load.shape[1] // 8)))
        axes.set_yticks(np.arange(0, load.shape[0], max(1, load.shape[0] // 8)))
    panels[0].set_ylabel("layer with experts", color=INK)
    figure.colorbar(image, ax=panels, label="load, as a multiple of the mean", extend="max")
    return save_figure(figure, path)


def plot_balance(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the largest violation over steps, of several runs."""
    runs = {Path(folder).absolute().name: read_run(Path(folder)) for folder in folders}
    figure, axes = blank_axes("how far the fullest expert is above the mean load", list(runs.values()))
    axes.set_ylabel("max violation, mean over layers", color=INK)
    for index, (name, records) in enumerate(runs.items()):
        points = curve(records, "max_violation")
        if not points:
            raise BadInput(f"the run {name} has no max_violation in its metrics; give runs of models with experts")
        axes.plot(
            *zip(*points, strict=True), color=RUN_COLOURS[index % len(RUN_COLOURS)], linewidth=1.4, label=shown(name)
        )
    axes.set_ylim(bottom=0.0)
    legend(axes)
    return save_figure(figure, path)


def plot_experts(folder: str | Path) -> list[Path]:
    """`expert-load.png` and `balance.png` in a run's folder; nothing for models without experts."""
    folder = Path(folder)
    if mean_load(read_run(folder)) is None:
        return []
    return [plot_expert_load([folder], folder / "expert-load.png"), plot_balance([folder], folder / "balance.png")]


def mean_load(records: list[Record]) -> np.ndarray | None:
    """[layers, experts]: the load as a multiple of the layer's mean, over the last records that have it."""
    loads = [record["expert_load"] for record in records if record.get("expert_load") is not None]
    if not loads:
        return None
    last: np.ndarray = np.asarray(loads[-max(1, round(LAST_PART * len(loads))) :], np.float64).sum(0)
    multiples: np.ndarray = last / np.maximum(last.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    return multiples
