"""Batches of preference pairs: every pair once an epoch, the same batch for the same step, what belongs to a pair with
it."""

import dataclasses

import numpy as np
import pytest

from llmq_jax.data import Example, PreferenceBatches, PreferenceEvaluation, PreferenceExample
from llmq_jax.errors import BadInput

RANDOM = np.random.default_rng(0)
COUNT, SIZE, LONGEST = 101, 8, 120


def side(number, length, response):
    """A row of the number alone, the last `response` tokens of which are the response."""
    tokens = np.full(length, number, np.int32)
    return Example(tokens, np.arange(length) >= length - response, "x")


# Pair i: tokens i + 1 on the chosen side, 1000 + i on the rejected one.
PAIRS = [
    PreferenceExample(
        *(side(first + i, int(RANDOM.integers(5, LONGEST)), int(RANDOM.integers(1, 5))) for first in (1, 1000)),
        margin=None,
        where=f"row {i}",
    )
    for i in range(COUNT)
]
COLUMNS = {"reference_logprobs": RANDOM.normal(size=(COUNT, 2)).astype(np.float32), "number": np.arange(COUNT)}


def batches(**changes):
    arguments = {"pairs": PAIRS, "batch_size": SIZE, "longest": LONGEST, "seed": 5}
    return PreferenceBatches(**{**arguments, **changes})


def check(batch, pairs=PAIRS, columns=None):
    """That a batch is right in every field; the numbers of its pairs."""
    width = batch["tokens"].shape[2]
    types = {"tokens": np.int32, "lengths": np.int32, "response_mask": np.float32, "mask": np.float32}
    shapes = {"tokens": (SIZE, 2, width), "lengths": (SIZE, 2), "response_mask": (SIZE, 2, width), "mask": (SIZE,)}
    for name in types:
        assert (batch[name].dtype, batch[name].shape) == (types[name], shapes[name])
    numbers = []
    for row in range(SIZE):
        if not batch["mask"][row]:
            assert not any(array[row].any() for array in batch.values())
            continue
        number = batch["tokens"][row, 0, 0] - 1
        numbers.append(int(number))
        for place, expected in enumerate((pairs[number].chosen, pairs[number].rejected)):
            length = len(expected.tokens)
            assert batch["lengths"][row, place] == length
            np.testing.assert_array_equal(batch["tokens"][row, place, :length], expected.tokens)
            np.testing.assert_array_equal(batch["response_mask"][row, place, :length], expected.learned)
            assert (
                not batch["tokens"][row, place, length:].any() and not batch["response_mask"][row, place, length:].any()
            )
        for name, column in (columns or {}).items():
            np.testing.assert_array_equal(batch[name][row], column[number])
    return numbers


@pytest.mark.parametrize("columns", [{}, COLUMNS], ids=["alone", "columns"])
def test_an_epoch_holds_every_pair_once(columns):
    found = batches(columns=columns)
    assert found.per_epoch == 13
    orders = []
    for epoch in range(2):
        taken = [found[epoch * 13 + i] for i in range(13)]
        assert all(set(batch) == {"tokens", "lengths", "response_mask", "mask", *columns} for batch in taken)
        orders.append([check(batch, columns=columns) for batch in taken])
        assert sorted(number for numbers in orders[-1] for number in numbers) == list(range(COUNT))
    assert orders[0] != orders[1]


def test_other_pairs_meet_in_another_epoch():
    """Where there are more than are sorted by length together."""
    found = batches(batch_size=2)
    epochs = [
        {frozenset(found[first + i]["tokens"][:, 0, 0].tolist()) for i in range(found.per_epoch)}
        for first in (0, found.per_epoch)
    ]
    assert len(epochs[0] & epochs[1]) < 20 < len(epochs[0])


def test_a_batch_is_a_function_of_seed_and_step():
    one, other = batches(), batches()
    for step in (70, 3, 0, 30):  # in any order
        for name, array in one[step].items():
            np.testing.assert_array_equal(array, other[step][name])
    assert any((one[i]["lengths"] != batches(seed=6)[i]["lengths"]).any() for i in range(3))
    for count in (2, 13, 20):
        seen = {number for step in range(count) for number in check(one[step])}
        assert one.rows_within(count) == sorted(seen)


def test_processes_share_the_pairs_of_a_batch():
    whole = batches(columns=COLUMNS)
    shares = [batches(columns=COLUMNS, process_index=index, process_count=4) for index in range(4)]
    for step in (0, 12):
        for name, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), array)
        assert {share.count_tokens(step) for share in shares} == {whole[step]["lengths"].sum()}
    with pytest.raises(BadInput, match="8 rows cannot be divided among 3 processes"):
        batches(process_count=3)


def test_shapes_are_few_and_little_is_padding():
    found = [batches()[i] for i in range(13)]
    assert len({batch["tokens"].shape for batch in found}) <= 4
    # A pair is as wide as the longer side.
    assert sum(batch["tokens"].size for batch in found) < 1.6 * sum(2 * len(pair) for pair in PAIRS)


def test_margins_are_there_where_any_pair_has_one():
    pairs = [dataclasses.replace(pair, margin=0.5 * i if i % 3 == 0 else None) for i, pair in enumerate(PAIRS)]
    margins = np.array([pair.margin or 0.0 for pair in pairs], np.float32)
    for found in (batches(pairs=pairs)[0], next(iter(PreferenceEvaluation(pairs, SIZE, LONGEST)))):
        assert found["margins"].dtype == np.float32 and found["margins"].shape == (SIZE,) and found["margins"].any()
        check(found, pairs, {"margins": margins})
    # In every batch, even if those of this one have none.
    one = [dataclasses.replace(PAIRS[0], margin=1.0), *PAIRS[1:]]
    assert sum(batches(pairs=one)[i]["margins"].sum() for i in range(13)) == 1.0
    assert "margins" not in batches()[0]


def test_evaluation_goes_over_all_pairs_once():
    found = list(PreferenceEvaluation(PAIRS, SIZE, LONGEST, columns=COLUMNS))
    assert len(found) == len(PreferenceEvaluation(PAIRS, SIZE, LONGEST)) == 13
    assert sorted(number for batch in found for number in check(batch, columns=COLUMNS)) == list(range(COUNT))


def test_evaluation_on_some_batches_is_spread_over_the_data():
    def numbers(batches):
        evaluation = PreferenceEvaluation(PAIRS, SIZE, LONGEST, batches)
        found = sorted(number for batch in evaluation for number in check(batch))
        longest = [batch["lengths"].max() for batch in evaluation]
        assert longest == sorted(longest)
        assert found == evaluation.indices and len(list(evaluation)) == len(evaluation)
        return found

    assert numbers(3) == numbers(3) and len(numbers(3)) == 24
    assert min(numbers(3)) < 25 and max(numbers(3)) > 75
    # Of all lengths, too: they are drawn before they are sorted.
    lengths = sorted(len(PAIRS[number]) for number in numbers(3))
    assert lengths[0] < 60 and lengths[-1] > 110
    assert set(numbers(2)) < set(numbers(3)) and numbers(99) == numbers(None) == list(range(COUNT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, "there is no preference pair"),
        ({"batch_size": 0}, "batch_size is 0 and must be at least 1"),
        ({"columns": {"a": np.zeros(5)}}, "column 'a' has 5 rows for 101 pairs"),
        ({"columns": {"margins": np.zeros(COUNT)}}, "a column may not be called 'margins'"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        batches(**changes)
    changes = {"pairs": PAIRS, "batch_size": SIZE, "longest": LONGEST, **changes}
    with pytest.raises(BadInput, match=message):
        PreferenceEvaluation(**changes)


def test_no_batch_to_evaluate():
    with pytest.raises(BadInput, match="batches is 0 and must be at least 1"):
        PreferenceEvaluation(PAIRS, SIZE, LONGEST, 0)


def test_a_pair_that_is_too_long_is_refused():
    with pytest.raises(BadInput, match=r"has \d+ tokens and a row holds 20"):
        [batches(longest=20)[i] for i in range(13)]
