import itertools
import json
import sys

import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training.plots import TRAINING, VALIDATION, draw_panels, plot_comparison, plot_losses


def run_folder(path, records):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def has_colour(path, colour):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    image = imread(path)[..., :3]
    return bool((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.01).any())


def test_draws_both_losses_over_steps_and_tokens(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    records = [{"step": s, "tokens": 100 * s, "loss": 5 / s, "grad_norm": None} for s in range(1, 9)]
    records.insert(4, {"step": 4, "tokens": 400, "validation_loss": 3.0})
    records.append({"step": 8, "tokens": 800, "validation_loss": 2.0})
    path = plot_losses(run_folder(tmp_path / "my run", records))
    assert path == tmp_path / "my run" / "losses.png"
    assert has_colour(path, TRAINING) and has_colour(path, VALIDATION)
    axes = figures[0].axes[0]
    training, validation = axes.lines
    np.testing.assert_array_equal(training.get_xydata(), [(s, 5 / s) for s in range(1, 9)])
    np.testing.assert_array_equal(validation.get_xydata(), [(4, 3.0), (8, 2.0)])
    assert not training.get_clip_on() and not validation.get_clip_on()  # points on the edges are whole
    (top,) = axes.child_axes
    assert (axes.get_xlabel(), top.get_xlabel(), axes.get_xlim(), top.get_xlim()) == (
        "steps",
        "tokens seen",
        (0, 8),
        (0, 800),
    )
    assert "matplotlib.pyplot" not in sys.modules


def test_validation_alone_and_no_tokens_will_do(tmp_path):
    path = plot_losses(run_folder(tmp_path / "run", [{"step": 4, "validation_loss": 3.0}]))
    assert has_colour(path, VALIDATION) and not has_colour(path, TRAINING)


def test_a_dollar_in_a_name_begins_no_formula(tmp_path):
    path = plot_losses(run_folder(tmp_path / "a$_$", [{"step": 4, "loss": 3.0}]))
    assert has_colour(path, TRAINING)


def test_panels_say_what_they_are_over_and_the_whole_of_their_figures():
    """A figure that hardly moves would have its axis told as differences from a number above it."""
    curves = {"entropy": [(1, 6.53748), (2, 6.53757), (3, 6.53770)]}
    figure = draw_panels([("entropy", curves)] * 3)
    figure.canvas.draw()
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "steps", "steps"]  # below each column
    assert {axes.yaxis.get_offset_text().get_text() for axes in figure.axes} == {""}


def test_long_titles_of_panels_are_whole():
    titles = ["validation_completions/mean_length", "rewards/my_very_long_function_name_of_all/mean"] * 3
    figure = draw_panels([(title, {title: [(1, 0.00025), (3, 0.00012)]}) for title in titles], 3)
    figure.canvas.draw()
    for axes in figure.axes:
        title = axes._left_title.get_window_extent()
        following = [other.bbox.x0 for other in figure.axes if other.bbox.x0 > axes.bbox.x0]
        assert title.x1 < min(following, default=figure.bbox.x1)


@pytest.mark.parametrize("columns", [2, 3])
def test_the_steps_below_panels_stand_apart(columns):
    figure = draw_panels([("entropy", {"entropy": [(1, 2.0), (2_800, 1.0)]})] * columns, columns)
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        labels = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) > 2
        assert all(left.x1 + 5 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("recipes", "label"),
    [
        (["train.instruct"], "loss (nats a token)"),
        (["train.grpo"], "loss"),
        ([None], "loss"),  # of lq.training.run, whose objective may be any
        (["train.pretrain", "train.instruct"], "loss (nats a token)"),
        (["train.pretrain", "train.classifier"], "loss"),
    ],
)
def test_the_axis_tells_the_unit_of_a_recipe_s_loss(tmp_path, monkeypatch, recipes, label):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    runs = []
    for index, recipe in enumerate(recipes):
        runs.append(run_folder(tmp_path / f"run{index}", [{"step": 4, "tokens": 8, "loss": 3.0}]))
        config = {"run_format": 1} if recipe is None else {"run_format": 1, "recipe": recipe}
        (runs[-1] / "config.json").write_text(json.dumps(config))
    if len(runs) == 1:
        plot_losses(runs[0])
    plot_comparison({run.name: [run] for run in runs}, tmp_path / "losses.png")
    assert {figure.axes[0].get_ylabel() for figure in figures} == {label}


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(BadInput, match=r"no metrics.jsonl in .*; give the folder of a run"):
        plot_losses(tmp_path)
    with pytest.raises(BadInput, match="has no losses yet"):
        plot_losses(run_folder(tmp_path / "run", [{"step": 4, "loss": None}]))
