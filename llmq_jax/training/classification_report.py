"""How well a classifier classifies: accuracy, precision, recall and F1, the confusion matrix, the worst errors.

For each class, precision is the share of its predictions that are right, recall the share of its texts that are found,
F1 their harmonic mean, 2PR / (P + R); each is 0 where it would be 0 / 0. Macro is the plain mean over classes, in which
small classes count as much as large ones.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmq_jax.errors import warn
from llmq_jax.training.metrics import one_line
from llmq_jax.training.plots import INK, blank_figure, fonts_with, save_figure

SCORES = ("precision", "recall", "f1")
WORST = 20
MOST_LABELS, WIDTH = 5, 80
"""The limits of a `prediction_line`: labels that it names, and characters of the text."""


@dataclass(frozen=True, eq=False)
class ClassificationReport:
    """The figures of one set of texts."""

    labels: tuple[str, ...]
    confusion: Int[np.ndarray, "C C"]
    """How many texts of each class (row) were taken for each class (column)."""
    loss: float
    """Mean of -log p(label), in nats, without class weights."""

    @property
    def accuracy(self) -> float:
        return _ratio(np.trace(self.confusion), self.confusion.sum())

    def scores(self, number: int) -> dict[str, float]:
        """Precision, recall and F1 of a class, and its number of texts."""
        right = self.confusion[number, number]
        taken, there = self.confusion[:, number].sum(), self.confusion[number].sum()
        figures = (_ratio(right, taken), _ratio(right, there), _ratio(2 * right, taken + there))
        return {**dict(zip(SCORES, figures, strict=True)), "texts": int(there)}

    def macro(self) -> dict[str, float]:
        """Precision, recall and F1, each the mean over classes."""
        classes = [self.scores(number) for number in range(len(self.labels))]
        return {name: float(np.mean([scores[name] for scores in classes])) for name in SCORES}

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "texts": int(self.confusion.sum()),
            "loss": self.loss,
            "accuracy": self.accuracy,
            "macro": self.macro(),
            "classes": {label: self.scores(number) for number, label in enumerate(self.labels)},
            "confusion": {"labels": list(self.labels), "rows_true_columns_predicted": self.confusion.tolist()},
        }

    def text(self) -> str:
        """The figures and the confusion matrix as tables."""
        figures = [["", *SCORES, "texts"]]
        for number, label in enumerate(self.labels):
            scores = self.scores(number)
            figures.append([label, *(f"{scores[name]:.4f}" for name in SCORES), f"{scores['texts']:,}"])
        figures.append(["macro", *(f"{value:.4f}" for value in self.macro().values()), f"{self.confusion.sum():,}"])
        confusion = [["true \\ predicted", *self.labels]]
        confusion += [
            [label, *(f"{count:,}" for count in row)] for label, row in zip(self.labels, self.confusion, strict=True)
        ]
        first = f"accuracy {self.accuracy:.4f}, loss {self.loss:.4f}"
        return "\n".join([first, "", *_aligned(figures), "", *_aligned(confusion)])


def classification_report(
    labels: Sequence[str], logits: Float[np.ndarray, "N C"], classes: Sequence[int]
) -> ClassificationReport:
    """The report of texts whose classes are known, from the logits that a classifier gave them."""
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (np.asarray(classes), logits.argmax(axis=1)), 1)
    return ClassificationReport(tuple(labels), confusion, float(losses(logits, classes).mean()))


def losses(logits: Float[np.ndarray, "N C"], classes: Sequence[int]) -> Float[np.ndarray, " N"]:
    """-log p(label) of each text, in float64."""
    logits = logits.astype(np.float64)
    each: np.ndarray = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), np.asarray(classes)]
    return each


def worst_errors(
    labels: Sequence[str],
    texts: Sequence[str],
    logits: Float[np.ndarray, "N C"],
    classes: Sequence[int],
    count: int = WORST,
) -> list[dict[str, Any]]:
    """The texts that were taken for another class, the most confident mistakes first: at most `count` of them, each
    with its label, the predicted one, the probability given to it, and the loss."""
    each, predicted = losses(logits, classes), logits.argmax(axis=1)
    wrong = np.flatnonzero(predicted != np.asarray(classes))
    chosen = wrong[np.argsort(-each[wrong], kind="stable")][:count]
    chances = probabilities(logits)
    return [
        {
            "loss": float(each[i]),
            "label": labels[classes[i]],
            "predicted": labels[predicted[i]],
            "probability": float(chances[i, predicted[i]]),
            "text": texts[i],
        }
        for i in chosen
    ]


def probabilities(logits: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """Softmax over classes, in float64."""
    logits = logits.astype(np.float64)
    chances: np.ndarray = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    return chances


def prediction(labels: Sequence[str], logits: Float[np.ndarray, " C"]) -> dict[str, Any]:
    """The prediction for a text: the likeliest label and the probability of each; for a scalar head, its number."""
    if len(labels) == 1:
        return {"scores": {labels[0]: float(logits[0])}}
    chances = probabilities(logits[None])[0]
    by_label = {label: float(chance) for label, chance in zip(labels, chances, strict=True)}
    return {"label": labels[chances.argmax()], "probabilities": by_label}


def prediction_line(text: str, said: dict[str, Any]) -> str:
    """The prediction as a line for people: the likeliest labels first, then the text, shortened."""
    likeliest = sorted((said.get("probabilities") or said["scores"]).items(), key=lambda pair: -pair[1])[:MOST_LABELS]
    return "  ".join([*(f"{label} {figure:.4f}" for label, figure in likeliest), one_line(text, WIDTH)])


def plot_confusion(report: ClassificationReport, path: str | Path) -> Path:
    """Draw the confusion matrix as a PNG: counts in the cells, coloured by the part of the row's class."""
    size = max(3.6, 0.7 * len(report.labels) + 2.2)
    figure = blank_figure((size + 0.8, size))
    axes = figure.add_subplot()
    parts = report.confusion / np.maximum(report.confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(parts, vmin=0.0, vmax=1.0, cmap="Blues")
    places = np.arange(len(report.labels))
    # A dollar in a label must not begin a formula.
    families, lacking = fonts_with("".join(report.labels))
    if lacking:
        warn(f"no font here has {lacking}: boxes stand for them in {path}")
    style = {"parse_math": False, "family": families}
    axes.set_xticks(places, report.labels, rotation=30 if len(report.labels) > 3 else 0, **style)
    axes.set_yticks(places, report.labels, **style)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.set_title(f"accuracy {report.accuracy:.4f}", loc="left", color=INK, fontweight="bold")
    for (row, column), count in np.ndenumerate(report.confusion):
        colour = "white" if parts[row, column] > 0.5 else INK
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    figure.colorbar(image, label="part of the class")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # told above, all in one line
        return save_figure(figure, path)


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right. A terminal shows Chinese, say, two
    columns wide."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    def padded(cell: str, column: int) -> str:
        space = " " * (widths[column] - cell_len(cell))
        return cell + space if column == 0 else space + cell

    return ["  ".join(padded(cell, column) for column, cell in enumerate(row)).rstrip() for row in rows]
