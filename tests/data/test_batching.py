import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq_jax.data import multi_token_rows, pack, packed_rows, pad
from llmq_jax.data.batching import count_tokens
from llmq_jax.errors import BadInput


def test_pad():
    tokens, lengths = pad([[1, 2, 3], [], np.array([4])])
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert lengths.tolist() == [3, 0, 1]
    assert tokens.dtype == lengths.dtype == np.int32
    assert pad([[1, 2]], length=4)[0].tolist() == [[1, 2, 0, 0]]
    assert pad([])[0].shape == (0, 0)


def test_bad_padding_and_packing():
    with pytest.raises(BadInput, match="sequence 1 has 3 tokens and a row holds 2"):
        pad([[1], [1, 2, 3]], length=2)
    with pytest.raises(BadInput, match="sequence 2 has 9 tokens and a row holds 8"):
        pack([1, 8, 9, 10], 8)
    with pytest.raises(BadInput, match="row 1 of the plan is longer"):
        packed_rows([[1, 2], [3, 4]], [[0], [0, 1]], 3)


@given(st.lists(st.integers(0, 20), max_size=60))
def test_packing_loses_nothing(lengths):
    capacity = 20
    sequences = [[1 + 100 * index + place for place in range(length)] for index, length in enumerate(lengths)]
    plan = pack(lengths, capacity)
    assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
    batch = packed_rows(sequences, plan, capacity)
    for row, indices in enumerate(plan):
        for segment, index in enumerate(indices, start=1):
            here = batch["segment_ids"][row] == segment
            assert batch["tokens"][row][here].tolist() == sequences[index]
            assert batch["positions"][row][here].tolist() == list(range(lengths[index]))
        padding = batch["segment_ids"][row] == 0
        assert (batch["tokens"][row][padding] == 0).all()
        assert (~padding).sum() == sum(lengths[index] for index in indices) <= capacity


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200))
def test_packing_is_tight(lengths):
    """At most 11/9 of the lower bound (plus one row): the guarantee of best fit decreasing."""
    fewest = -(-sum(lengths) // 20)
    big = sum(length > 10 for length in lengths)  # no two of these share a row
    rows = len(pack(lengths, 20))
    assert rows >= fewest
    assert rows <= max(2 * fewest, big)
    assert pack(np.array(lengths), 20) == pack(lengths, 20)


def test_known_packing():
    # 7+3, 6+4, 5+5: filled to the brim, the longest first, each into the fullest row it fits.
    assert pack([3, 4, 5, 5, 6, 7], 10) == [[5, 0], [4, 1], [2, 3]]
    assert pack([2, 6, 8], 10) == [[2, 0], [1]]


def test_packing_many_is_fast():
    lengths = np.random.default_rng(0).integers(1, 1024, 100_000)
    started = time.process_time()  # of this process alone: the machine may be busy
    plan = pack(lengths, 1024)
    assert time.process_time() - started < 10
    assert len(plan) < 1.005 * lengths.sum() / 1024


# Documents for multi-token prediction.

GOLDEN = json.loads((Path(__file__).parent / "multi_token_collators.json").read_text())
"""What the original repository's two collators give, computed by its own code."""
END, IGNORED = 50256, -100


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("name", ["collate_function_mtp", "collate_function_mtp_experimental"])
def test_rows_for_multi_token_prediction_are_the_original_s(name, case):
    inputs, theirs = GOLDEN["inputs"][case], GOLDEN[name][case]
    options = {"shrink": name.endswith("experimental"), "longest": inputs["custom_max_len"]}
    batch = multi_token_rows(inputs["batch"], inputs["k"], END, **options)
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    assert batch["tokens"].tolist() == theirs["x"]
    assert batch["ahead_tokens"].swapaxes(0, 1).tolist() == theirs["shifted_x"]
    targets = np.where(batch["mask"], batch["targets"], IGNORED)
    assert targets.tolist() == theirs["y"]
    ahead = np.where(batch["ahead_mask"], batch["ahead_targets"], IGNORED)
    assert ahead.swapaxes(0, 1).tolist() == theirs["shifted_y"]
    # What is read counts, and nothing else: the others are filled with ends that no loss sees.
    assert (batch["targets"][batch["mask"] == 0] == END).all()
    np.testing.assert_array_equal(batch["segment_ids"], batch["mask"])


def test_documents_too_short_for_multi_token_prediction_are_left_out():
    batch = multi_token_rows([[1, 2], [3], [4, 5, 6]], 2, 0)
    assert batch["tokens"].tolist() == [[4, 5, 6]] and batch["ahead_tokens"].tolist() == [[[5, 6, 0], [6, 0, 0]]]
    # The rows are as long as the longest of all.
    empty = multi_token_rows([[1, 2], [3]], 2, 0)
    assert empty["tokens"].shape == (0, 2) and empty["ahead_mask"].shape == (0, 2, 2)
    assert multi_token_rows([], 1, 0)["targets"].shape == (0, 0)
    with pytest.raises(BadInput, match="longest=0 must be at least 1 token"):
        multi_token_rows([[1, 2]], 1, 0, longest=0)
    with pytest.raises(BadInput, match="depth=0 must be at least 1"):
        multi_token_rows([[1, 2]], 0, 0)


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(1, 4), st.booleans())
def test_every_stream_learns_one_end_of_each_document(lengths, depth, shrink):
    documents = [list(range(1, length + 1)) for length in lengths]
    batch = multi_token_rows(documents, depth, 0, shrink=shrink)
    kept = [length for length in lengths if length > depth]
    assert len(batch["tokens"]) == len(kept)
    streams = {0: (batch["targets"], batch["mask"])}
    streams |= {k: (batch["ahead_targets"][:, k - 1], batch["ahead_mask"][:, k - 1]) for k in range(1, depth + 1)}
    for k, (targets, mask) in streams.items():
        for length, row, counts in zip(kept, targets, mask, strict=True):
            read = length - (depth if shrink else k)
            assert row[counts == 1].tolist() == [*range(k + 2, k + read + 1), 0]


def test_tokens_are_counted_from_the_masks():
    ones, some = np.ones((2, 3)), np.array([[1, 0, 0], [1, 1, 0]])
    assert count_tokens({"tokens": ones, "mask": some}) == 3
    assert count_tokens({"tokens": ones, "mask": some, "segment_ids": np.array([[1, 1, 2], [1, 2, 0]])}) == 5
    assert count_tokens({"chosen_mask": some, "rejected_mask": np.ones((2, 3))}) == 9
    assert count_tokens({"tokens": ones, "mask": np.ones(2), "lengths": np.array([3, 1])}) == 4
    assert count_tokens({"tokens": ones}) == 6
