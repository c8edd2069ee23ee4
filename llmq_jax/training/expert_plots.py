"""How evenly experts were loaded, as PNG: heat maps (layers by experts), and the largest violation over steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.models import build, config_from_fields
from llmq_jax.models.deepseek3 import MTP, modules_ahead
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
from llmq_jax.training.run_config import CONFIG, read_run_config

# A heat map shows the mean over this part of the records, the last ones.
LAST_PART = 0.2


def plot_expert_load(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the load of every expert in every layer, as a multiple of the mean, for several runs side by side."""
    return save_figure(draw_expert_load(folders), path)


def draw_expert_load(folders: Sequence[str | Path]) -> Any:
    """The figure of `plot_expert_load`."""
    loads: dict[str, np.ndarray] = {}
    names: list[list[str]] = []
    for folder in folders:
        name, load = Path(folder).absolute().name, mean_load(read_run(Path(folder)))
        if load is None:
            raise BadInput(f"the run {name} has no expert_load in its metrics; give runs of models with experts")
        loads[name] = load
        names.append(_row_names(Path(folder), len(load)))
    layers, experts = map(max, zip(*(load.shape for load in loads.values()), strict=True))
    width = max(3.2, 0.28 * experts + 1.2)
    figure = blank_figure((width * len(loads) + 0.8, max(2.6, 0.3 * layers + 1.6)))
    panels = figure.subplots(1, len(loads), squeeze=False)[0]
    for axes, rows, (name, load) in zip(panels, names, loads.items(), strict=True):
        # 2 is twice the mean; what is above it is drawn as 2.
        image = axes.imshow(load, vmin=0.0, vmax=2.0, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        title = f"{name}\nfullest {load.max():.1f} times the mean"
        axes.set_title(title, loc="left", color=INK, fontsize=9, parse_math=False)
        axes.set_xlabel("expert", color=INK)
        axes.set_xticks(np.arange(0, load.shape[1], max(1, load.shape[1] // 8)))
        axes.set_yticks(np.arange(len(rows)), rows)
    panels[0].set_ylabel("layer with experts", color=INK)
    figure.colorbar(image, ax=panels, label="load, as a multiple of the mean", extend="max")
    return figure


def _row_names(folder: Path, rows: int) -> list[str]:
    """What the rows of a run's load are called: the numbers of its model's layers that have experts, then "mtp 1", ...
    if its modules of multi-token prediction trained. Plain numbers where the run does not tell."""
    plain = [str(row) for row in range(rows)]
    fields = (read_run_config(folder / CONFIG) or {}).get("model")
    try:
        config = config_from_fields(fields if isinstance(fields, dict) else {})
    except BadInput:
        return plain
    experts = build(config).experts
    layers = [str(i) for i in range(config.num_hidden_layers) if experts is not None and experts.in_layer(i)]
    modules = [f"{MTP} {depth}" for depth in range(1, modules_ahead(config) + 1)]
    return next((names for names in (layers, layers + modules) if len(names) == rows), plain)


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
