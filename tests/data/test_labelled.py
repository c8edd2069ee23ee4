import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq_jax.data import LabelledTexts, read_labelled
from llmq_jax.errors import BadInput


def labelled(labels, names=("a", "b", "c")):
    return LabelledTexts([f"text {i}" for i in range(len(labels))], list(labels), names)


def test_reading(tmp_path):
    (tmp_path / "a.tsv").write_text('spam\tWIN "now\nham\tok\nspam\tcash\n')
    read = read_labelled(tmp_path / "a.tsv", columns=["label", "text"])
    assert read == LabelledTexts(['WIN "now', "ok", "cash"], [1, 0, 1], ("ham", "spam"))
    (tmp_path / "b.jsonl").write_text('{"body": "x", "kind": 10}\n{"body": "y", "kind": 9}\n')
    read = read_labelled(tmp_path / "b.jsonl", "body", "kind")
    assert (read.labels, read.names) == ([1, 0], ("9", "10")), "numbers are sorted as numbers"


def test_a_folder_of_files(tmp_path):
    (tmp_path / "a.tsv").write_text("spam\tWIN\n")
    (tmp_path / "b.csv").write_text("ham,ok\n")
    (tmp_path / "c.jsonl").write_text('{"text": "x", "label": "spam"}\n')
    read = read_labelled(tmp_path, columns=["label", "text"])
    assert read == LabelledTexts(["WIN", "ok", "x"], [1, 0, 1], ("ham", "spam"))
    (tmp_path / "b.csv").write_text("kind,text\nham,ok\n")
    (tmp_path / "a.tsv").unlink()
    with pytest.raises(
        BadInput, match=r"b\.csv: the header has no field 'label' \(fields found: kind, text\): choose one"
    ):
        read_labelled(tmp_path)


def test_labels_of_digits_have_one_order(tmp_path):
    """ "7" and "07" are two labels of one number, and Python reads none of 5,000 digits."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "x", "label": each}) + "\n" for each in ("7", "07", 3, "0007", -1, "007", -2))
    )
    assert read_labelled(tmp_path / "a.jsonl").names == ("-2", "-1", "3", "0007", "007", "07", "7")
    for other in ("1" * 5000, "²"):  # nor is a digit above the line a number
        (tmp_path / "b.csv").write_text(f"text,label\nx,9\ny,{other}\n", encoding="utf-8")
        assert read_labelled(tmp_path / "b.csv").names == tuple(sorted((other, "9")))


def test_white_space_around_a_label_is_no_part_of_it(tmp_path):
    (tmp_path / "a.csv").write_text("label, text\nham ,x\nham,y\n spam,z\n")
    read = read_labelled(tmp_path / "a.csv")
    assert (read.labels, read.names) == ([0, 0, 1], ("ham", "spam"))


def test_a_class_without_examples_stays_without():
    """As when a classifier goes on that knows more classes than the data."""
    assert labelled([0] * 3 + [2]).balanced().counts() == [1, 0, 1]
    np.testing.assert_allclose(labelled([0] * 3 + [2]).class_weights(), [2 / 3, 1, 2])
    parts = labelled([0] * 10 + [2] * 10).stratified_split()
    assert [part.counts() for part in parts] == [[7, 0, 7], [1, 0, 1], [2, 0, 2]]


def test_names_of_another_file(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,b\ny,b\n")
    assert read_labelled(tmp_path / "a.csv", names=("c", "b", "a")) == LabelledTexts(
        ["x", "y"], [1, 1], ("c", "b", "a")
    )
    with pytest.raises(BadInput, match=r"a\.csv: line 2: label 'b' is none of the classes a, c"):
        read_labelled(tmp_path / "a.csv", names=("a", "c"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x", "label": "a"}', r"every label is 'a'"),
        ('{"text": " ", "label": "a"}', r"line 1: field 'text' holds no text"),
        ('{"body": "x", "label": "a"}', r"line 1 has no field 'text' .*--text-field"),
        ('{"text": "x", "kind": "a"}', r"line 1 has no field 'label' \(fields found: text, kind\): .*--label-field"),
        ('{"text": "x", "label": ""}', r"line 1: field 'label' is '' and must be a label"),
        ('{"text": "x", "label": 0.5}', r"field 'label' is 0\.5 and must be a label: a string or a whole number"),
        ('{"text": "x", "label": true}', r"field 'label' is True and must be a label"),
        ('{"text": "x", "label": "a\\ud800"}', r"line 1: field 'label': half a surrogate pair at character 1"),
    ],
)
def test_bad_rows(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_labelled(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_what_is_no_labelled_text():
    for arguments, message in (
        ((["x"], [], ("a", "b")), "1 text and 0 labels"),
        ((["x"], [0], ("a",)), "only 1, 'a'"),
        ((["x"], [2], ("a", "b")), "label 2 is none of the 2 classes"),
    ):
        with pytest.raises(BadInput, match=message):
            LabelledTexts(*arguments)


def test_duplicates():
    texts = LabelledTexts(["x", "y", "x", "z", "y", "X", "x"], [0, 0, 0, 1, 1, 1, 0], ("a", "b"))
    kept, repeated, contradictory = texts.without_duplicates()
    assert kept == LabelledTexts(["x", "z", "X"], [0, 1, 1], ("a", "b"))
    assert (repeated, contradictory) == (2, 2), "y is both, and wholly gone"


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 2**40))
def test_balance(labels, seed):
    texts = labelled([0, 1, 2, *labels])
    balanced = texts.balanced(seed)
    assert balanced.counts() == [min(texts.counts())] * 3
    assert [int(text.split()[1]) for text in balanced.texts] == sorted(int(text.split()[1]) for text in balanced.texts)
    assert all(texts.labels[texts.texts.index(text)] == label for text, label in zip(*_columns(balanced), strict=True))
    assert texts.balanced(seed) == balanced


def _columns(texts):
    return texts.texts, texts.labels


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 2**40))
def test_stratified_splits(labels, seed):
    texts = labelled([0, 1, 2] * 4 + labels)
    parts = texts.stratified_split(seed=seed)
    assert sorted(text for part in parts for text in part.texts) == sorted(texts.texts)
    for label, count in enumerate(texts.counts()):
        counts = [part.counts()[label] for part in parts]
        assert counts[1:] == [max(1, round(0.1 * count)), max(1, round(0.2 * count))] and sum(counts) == count
    assert texts.stratified_split(seed=seed) == parts


def test_seeds_choose_and_stay():
    texts = labelled([0, 1] * 50, ("a", "b"))
    assert len({tuple(texts.stratified_split(seed=seed)[2].texts) for seed in range(20)}) == 20
    assert len({tuple(labelled([0] * 5 + [1] * 50, ("a", "b")).balanced(seed).texts) for seed in range(20)}) == 20
    # These very examples, in every version of numpy and on every machine.
    few = labelled([0, 0, 1, 1, 1, 1, 1, 1], ("a", "b")).balanced(0)
    assert few.texts == ["text 0", "text 1", "text 2", "text 4"]


def test_bad_splits():
    texts = labelled([0, 0, 1, 1, 1], ("a", "b"))
    with pytest.raises(BadInput, match=r"class 'a' has 2 examples, too few for 3 parts of 0.7, 0.1, 0.2"):
        texts.stratified_split()
    for fractions in ((), (1.5, -0.5), (0.5, 0.4)):
        with pytest.raises(BadInput, match="add up to 1"):
            texts.stratified_split(fractions)
    with pytest.raises(BadInput, match="there is no example to balance"):
        labelled([]).balanced()


@given(st.lists(st.integers(0, 2), max_size=30))
def test_class_weights(labels):
    texts = labelled([0, 1, 2, *labels])
    weights = texts.class_weights()
    products = weights * texts.counts()
    np.testing.assert_allclose(products, products[0], rtol=1e-6)
    assert weights[texts.labels].mean() == pytest.approx(1)
