"""Accuracy, precision, recall, F1, confusion and errors against values computed by hand."""

import json

import numpy as np
import pytest

from llmq_jax.training.classification_report import (
    classification_report,
    losses,
    plot_confusion,
    prediction,
    prediction_line,
    probabilities,
    worst_errors,
)
from llmq_jax.training.plots import fonts_with

LABELS = ("ham", "spam", "unsure")
# Ten texts: 5 ham, 4 spam, 1 unsure; taken for
TRUE = [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
TAKEN = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]


def logits_for(taken, gap=2.0):
    logits = np.zeros((len(taken), 3), np.float32)
    logits[np.arange(len(taken)), taken] = gap
    return logits


@pytest.fixture
def report():
    return classification_report(LABELS, logits_for(TAKEN), TRUE)


def test_confusion_has_true_classes_in_rows(report):
    assert report.confusion.tolist() == [[3, 2, 0], [1, 3, 0], [1, 0, 0]]


def test_scores_by_hand(report):
    assert report.accuracy == pytest.approx(6 / 10)
    # ham: 3 right of 5 taken for it, and of 5 there.
    assert report.scores(0) == pytest.approx({"precision": 3 / 5, "recall": 3 / 5, "f1": 3 / 5, "texts": 5})
    # spam: 3 right of 5 taken for it, and of 4 there: 2 · 0.6 · 0.75 / 1.35.
    assert report.scores(1) == pytest.approx({"precision": 0.6, "recall": 0.75, "f1": 2 / 3, "texts": 4})
    # unsure: nothing was taken for it.
    assert report.scores(2) == pytest.approx({"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 1})
    assert report.macro() == pytest.approx(
        {"precision": (0.6 + 0.6) / 3, "recall": (0.6 + 0.75) / 3, "f1": (0.6 + 2 / 3) / 3}
    )


def test_loss_by_hand(report):
    right, wrong = np.log(1 + 2 * np.exp(-2.0)), 2 + np.log(1 + 2 * np.exp(-2.0))
    assert report.loss == pytest.approx((6 * right + 4 * wrong) / 10, abs=1e-6)


def test_probabilities_of_large_logits_are_finite():
    logits = np.array([[1e4, -1e4], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(probabilities(logits), [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(losses(logits, [1, 0]), [2e4, np.log(2)])


def test_a_class_without_texts_is_no_division_by_zero():
    report = classification_report(LABELS, logits_for([0, 0]), [0, 0])
    assert report.scores(1) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 0}
    assert (report.accuracy, report.scores(0)["f1"]) == (1.0, 1.0)


def test_json_holds_all(report):
    values = json.loads(json.dumps(report.to_json()))
    assert values["accuracy"] == 0.6 and values["texts"] == 10
    assert values["classes"]["spam"]["recall"] == 0.75
    assert values["confusion"] == {"labels": list(LABELS), "rows_true_columns_predicted": report.confusion.tolist()}


def test_text_is_two_tables(report):
    assert report.text().splitlines() == [
        f"accuracy 0.6000, loss {report.loss:.4f}",
        "",
        "        precision  recall      f1  texts",
        "ham        0.6000  0.6000  0.6000      5",
        "spam       0.6000  0.7500  0.6667      4",
        "unsure     0.0000  0.0000  0.0000      1",
        "macro      0.4000  0.4500  0.4222     10",
        "",
        "true \\ predicted  ham  spam  unsure",
        "ham                 3     2       0",
        "spam                1     3       0",
        "unsure              1     0       0",
    ]


def test_worst_errors_are_the_most_confident_mistakes():
    logits = logits_for(TAKEN) * np.arange(1, 11, dtype=np.float32)[:, None]
    texts = [f"text {i}" for i in range(10)]
    errors = worst_errors(LABELS, texts, logits, TRUE, count=3)
    assert [error["text"] for error in errors] == ["text 9", "text 8", "text 4"]
    assert (errors[0]["label"], errors[0]["predicted"]) == ("unsure", "ham")
    assert errors[0]["loss"] == pytest.approx(20, abs=1e-6) and errors[0]["probability"] == pytest.approx(1)
    assert len(worst_errors(LABELS, texts, logits, TRUE)) == 4  # mistakes alone
    assert worst_errors(LABELS, texts, logits_for(TRUE), TRUE) == []


@pytest.mark.parametrize("labels", [("$a_", "x^$"), (r"$\frac$", "b")])
def test_a_dollar_in_a_label_begins_no_formula(labels, tmp_path):
    report = classification_report(labels, np.eye(2, dtype=np.float32), [0, 1])
    assert plot_confusion(report, tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_labels_that_the_default_font_lacks(tmp_path, monkeypatch):
    """Another font that is installed draws them; what none has, a line tells."""
    font_manager = pytest.importorskip("matplotlib.font_manager")
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]  # the same on all machines
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    families, lacking = fonts_with("a\u23b4")  # a bracket lying down
    assert (families[0], len(families), lacking) == ("sans-serif", 2, "")
    report = classification_report(("垃圾", "\ue12e"), np.eye(2, dtype=np.float32), [0, 1])
    with pytest.warns(UserWarning) as told:
        plot_confusion(report, tmp_path / "confusion.png")
    assert [str(each.message) for each in told] == [
        f"no font here has 圾垃: boxes stand for them in {tmp_path / 'confusion.png'}"
    ]


def test_predictions_for_people_and_for_programs():
    said = prediction(("text", "b"), np.array([0.0, np.log(3)], np.float32))
    assert said["label"] == "b" and said["probabilities"] == pytest.approx({"text": 0.25, "b": 0.75})
    assert prediction_line("x\ny", said) == "b 0.7500  text 0.2500  x y"
    assert len(prediction_line("x" * 99, said).removeprefix("b 0.7500  text 0.2500  ")) == 80
    # A scalar head, whatever its label is called.
    said = prediction(("text",), np.array([1.5], np.float32))
    assert said == {"scores": {"text": 1.5}} and prediction_line("x", said) == "text 1.5000  x"


def test_labels_that_are_two_columns_wide_are_aligned():
    lines = classification_report(("垃圾", "ham"), np.eye(2, dtype=np.float32), [0, 1]).text().splitlines()
    assert lines[-2:] == ["垃圾                 1    0", "ham                  0    1"]


def test_the_confusion_matrix_is_drawn(report, tmp_path):
    path = plot_confusion(report, tmp_path / "confusion.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
