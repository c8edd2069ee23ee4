"""Batches of texts of similar length: few shapes, every row once, the same batch for the same step."""

import numpy as np
import pytest

from llmq_jax.data.length_buckets import (
    LabelledBatches,
    LabelledEvaluation,
    bucket_width,
    by_length,
    padded_rows,
)
from llmq_jax.errors import BadInput

LENGTHS = np.random.default_rng(0).integers(1, 120, 203).tolist()
# Row i is made of the number i + 1 alone.
ROWS = [[i + 1] * length for i, length in enumerate(LENGTHS)]
FIELDS = ("tokens", "lengths", "labels", "mask")
LABELS = [i % 3 for i in range(len(ROWS))]


def batches(**changes):
    arguments = {"rows": ROWS, "labels": LABELS, "batch_size": 8, "longest": 100 + 20, "seed": 5}
    return LabelledBatches(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("length", "width"), [(0, 32), (1, 32), (32, 32), (33, 64), (64, 64), (65, 96), (96, 96), (97, 120), (120, 120)]
)
def test_widths(length, width):
    assert bucket_width(length, 120) == width


def test_an_epoch_holds_every_row_once_with_its_label():
    found = batches()
    for epoch in range(2):
        seen = []
        for batch in (found[epoch * found.per_epoch + i] for i in range(found.per_epoch)):
            assert {name: array.shape[0] for name, array in batch.items()} == dict.fromkeys(batch, 8)
            for tokens, length, label, mask in zip(
                *(batch[n] for n in ("tokens", "lengths", "labels", "mask")), strict=True
            ):
                if mask:
                    row = tokens[0] - 1
                    assert tokens[:length].tolist() == ROWS[row] and not tokens[length:].any()
                    assert label == LABELS[row]
                    seen.append(row)
                else:
                    assert length == 0 and not tokens.any()
        assert sorted(seen) == list(range(len(ROWS)))


def test_a_batch_is_a_function_of_seed_and_step():
    one, other = batches(), batches()
    for step in (70, 3, 0, 30):  # in any order
        for name in FIELDS:
            np.testing.assert_array_equal(one[step][name], other[step][name])
    assert any((one[i]["lengths"] != batches(seed=6)[i]["lengths"]).any() for i in range(3))
    assert any((one[i]["lengths"] != one[i + one.per_epoch]["lengths"]).any() for i in range(3))
    first, second = (
        {frozenset(one[epoch * one.per_epoch + i]["tokens"][:, 0].tolist()) for i in range(one.per_epoch)}
        for epoch in range(2)
    )
    assert first != second, "other rows meet in a batch"
    found = [one[step]["tokens"][:, 0].tolist() for step in (3, 30)]  # in every version, or a resumed run would differ
    assert found == [[162, 143, 135, 89, 51, 119, 29, 102], [21, 38, 130, 72, 5, 103, 203, 84]]


def test_processes_share_the_rows_of_a_batch():
    shares = [batches(process_index=index, process_count=4) for index in range(4)]
    for step in (0, 3, batches().per_epoch - 1):
        whole = batches()[step]
        for name in FIELDS:
            np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), whole[name])
        assert {share.count_tokens(step) for share in shares} == {whole["lengths"].sum()}
    with pytest.raises(BadInput, match="8 rows cannot be divided among 3 processes"):
        batches(process_count=3)


def test_shapes_are_few_and_little_is_padding():
    found = [batches()[i] for i in range(batches().per_epoch)]
    assert len({batch["tokens"].shape for batch in found}) <= 4
    padded = sum(batch["tokens"].size for batch in found)
    assert padded < 1.5 * sum(LENGTHS)
    # And short batches do not all come first.
    widths = [batch["tokens"].shape[1] for batch in found]
    assert widths != sorted(widths)


def test_evaluation_goes_over_all_rows_once():
    seen = []
    evaluation = LabelledEvaluation(ROWS, LABELS, 8, 120)
    for batch in evaluation:
        real = batch["mask"] > 0
        seen += (batch["tokens"][real, 0] - 1).tolist()
        np.testing.assert_array_equal(batch["labels"][real], [LABELS[i] for i in batch["tokens"][real, 0] - 1])
    assert sorted(seen) == list(range(len(ROWS))) and len(evaluation) == 26


def test_by_length_sorts():
    assert by_length([3, 1, 2, 1], 3) == [[1, 3, 2], [0]]


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(BadInput, match="sequence 1 has 9 tokens and a row holds 8"):
        padded_rows([[1], [2] * 9], [0, 1], 2, 8)


def test_nothing_to_train_on():
    with pytest.raises(BadInput, match="no text to train on"):
        batches(rows=[], labels=[])
