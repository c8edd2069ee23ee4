import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq_jax.data import check_vocabulary, evaluation_batches, training_batches
from llmq_jax.data.windows import as_stream
from llmq_jax.errors import BadInput


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def stream(length):
    """Tokens that tell their place."""
    return np.arange(length, dtype=np.uint32)


def test_shapes_and_types():
    batch = training_batches(stream(100).astype(np.uint16), context=7, batch_size=3)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((3, 7), "int32"),
        "targets": ((3, 7), "int32"),
        "mask": ((3, 7), "float32"),
    }
    assert np.array_equal(batch["targets"], batch["tokens"] + 1), "targets are the tokens that follow"
    assert batch["mask"].all()
    for make in (training_batches, evaluation_batches):
        listed, array = (make(tokens, context=7, batch_size=3)[0] for tokens in (list(range(100)), stream(100)))
        assert equal(listed, array)


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_an_epoch_shows_every_window_once(length, context, batch_size, seed):
    if length < context + 1:
        length = context + 1
    batches = training_batches(stream(length), context=context, batch_size=batch_size, seed=seed)
    assert batches.windows == max(1, length // context - 1)
    epochs = 3
    rows = [row for step in range(-(-epochs * batches.windows // batch_size)) for row in batches[step]["tokens"]]
    for epoch in range(epochs):
        inputs = np.sort(np.concatenate(rows[epoch * batches.windows : (epoch + 1) * batches.windows]))
        # Consecutive windows: one run of tokens without gap or repetition, all with a target in the text.
        assert np.array_equal(inputs, np.arange(inputs[0], inputs[0] + batches.windows * context))
        assert inputs[-1] + 1 < length


def test_epochs_and_seeds_differ():
    def epoch(seed, number, windows=99):
        batches = training_batches(stream(1000), context=10, batch_size=windows, seed=seed)
        assert batches.windows == windows
        return batches[number]["tokens"][:, 0]

    first = epoch(0, 0)
    orders = {tuple(epoch(seed, number) // 10) for seed in range(5) for number in range(5)}
    assert len(orders) == 25, "seed s and epoch e must not be seed s + e and epoch 0"
    assert len({epoch(0, number).min() for number in range(20)}) > 5, "the first window's offset is drawn anew"
    assert not np.array_equal(first, np.sort(first)), "shuffled"
    assert max(epoch(0, number).max() for number in range(40)) + 10 >= 998, "the end of the text has its turn"
    pinned = [epoch(3, number)[:2].tolist() for number in range(3)]
    assert pinned == [[191, 521], [670, 440], [393, 883]], "a run that a later version resumes finds the same windows"
    short = training_batches(stream(6), context=4, batch_size=1)
    assert {int(short[number]["tokens"][0, 0]) for number in range(20)} == {0, 1}, "with its last token"


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=10), st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_batch_depends_on_the_step_alone(steps, separate):
    arguments = {"context": 5, "batch_size": 4, "seed": 3, "end_of_text": 7, "separate_documents": separate}
    tokens = stream(200) % 10
    batches = training_batches(tokens, **arguments)
    first = {step: batches[step] for step in steps}
    fresh = training_batches(tokens, **arguments)
    assert all(equal(fresh[step], first[step]) for step in sorted(steps, reverse=True))


@pytest.mark.parametrize("make", [training_batches, evaluation_batches])
@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_share_the_rows(make, process_count):
    arguments = {"context": 4, "batch_size": 6, "end_of_text": 5, "separate_documents": True}
    tokens = stream(103) % 11
    whole = make(tokens, **arguments)
    parts = [make(tokens, **arguments, process_index=i, process_count=process_count) for i in range(process_count)]
    for step in range(5):
        shares = [part[step] for part in parts]
        assert equal(whole[step], {key: np.concatenate([share[key] for share in shares]) for key in shares[0]})


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None)
def test_evaluation_counts_every_target_once(length, context, batch_size):
    batches = evaluation_batches(stream(length), context=context, batch_size=batch_size)
    seen = Counter()
    collected = list(batches)
    assert len(collected) == len(batches)
    assert collected[-1]["mask"].any()
    for batch in collected:
        assert batch["tokens"].shape == batch["targets"].shape == batch["mask"].shape == (batch_size, context)
        counted = batch["mask"] == 1
        assert np.array_equal(batch["targets"][counted], batch["tokens"][counted] + 1)
        assert not batch["tokens"][~counted].any()
        assert not batch["targets"][~counted].any()
        seen.update(batch["targets"][counted].tolist())
    assert seen == Counter(range(1, length))
    # Windows are consecutive: window w starts at w * context.
    starts = np.concatenate([batch["tokens"][:, 0] for batch in collected])
    windows = -(-(length - 1) // context)
    assert np.array_equal(starts[:windows], np.arange(windows) * context)


def test_separate_documents():
    end = 9
    # The end of one document, a whole one, an empty one, the beginning of the last.
    tokens = np.array([1, 2, end, 3, 4, 5, end, end, 6, 7, 8], np.uint16)
    arguments = {"context": 10, "batch_size": 1, "end_of_text": end, "separate_documents": True}
    expected = {
        "tokens": [[1, 2, 9, 3, 4, 5, 9, 9, 6, 7]],
        "targets": [[2, 9, 3, 4, 5, 9, 9, 6, 7, 8]],
        "mask": [[1, 1, 0, 1, 1, 1, 0, 0, 1, 1]],  # the end of its own document is a target, what follows is not
        "segment_ids": [[1, 1, 1, 2, 2, 2, 2, 3, 4, 4]],
        "positions": [[0, 1, 2, 0, 1, 2, 3, 0, 0, 1]],
    }
    for batch in (training_batches(tokens, **arguments)[0], evaluation_batches(tokens, **arguments)[0]):
        assert {key: value.tolist() for key, value in batch.items()} == expected
        assert {value.dtype.name for key, value in batch.items() if key != "mask"} == {"int32"}
        assert batch["mask"].dtype == np.float32


def test_separate_documents_of_padding():
    batch = evaluation_batches(
        np.array([1, 9, 2], np.uint16), context=4, batch_size=2, end_of_text=9, separate_documents=True
    )[0]
    assert batch["segment_ids"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["mask"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("make", [training_batches, evaluation_batches])
def test_tokens_on_disk(tmp_path, make):
    stream(500).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    arguments = {"context": 8, "batch_size": 2}
    assert equal(make(mapped, **arguments)[3], make(stream(500), **arguments)[3])


def test_bad_windows():
    with pytest.raises(BadInput, match=r"has 8 tokens and one window needs 9 \(context \+ 1\)"):
        training_batches(stream(8), context=8, batch_size=1)
    assert training_batches(stream(9), context=8, batch_size=1)[5]["targets"].tolist() == [list(range(1, 9))]
    with pytest.raises(BadInput, match="1 token and needs at least 2"):
        evaluation_batches(stream(1), context=8, batch_size=1)
    with pytest.raises(BadInput, match="seed must not be negative"):
        training_batches(stream(20), context=8, batch_size=1, seed=-1)
    for make in (training_batches, evaluation_batches):
        with pytest.raises(BadInput, match="must be at least 1"):
            make(stream(20), context=0, batch_size=1)
        with pytest.raises(BadInput, match="6 rows cannot be divided among 4 processes"):
            make(stream(20), context=2, batch_size=6, process_count=4)
        with pytest.raises(BadInput, match="needs the end-of-text token"):
            make(stream(20), context=2, batch_size=6, separate_documents=True)
        with pytest.raises(IndexError):
            make(stream(20), context=2, batch_size=6)[-1]
        with pytest.raises(BadInput, match=r"^the .* text has 0 tokens"):
            make([], context=2, batch_size=6)


@pytest.mark.parametrize(
    "wrong", ["some text", [[1, 2], [3, 4]], [[1, 2], [3]], np.zeros((2, 9), np.uint16), [0.5, 1.5], ["a", "b"], 5]
)
def test_what_is_no_stream_of_tokens(wrong):
    """By itself: the annotations of both functions are checked in these tests."""
    with pytest.raises(BadInput) as error:
        as_stream(wrong)
    message = str(error.value)
    assert message.endswith(" must be ids in one list or array, as encode_documents gives them") and "\n" not in message


def test_a_corpus_is_not_spelled_out_for_a_message():
    class Text:
        spelled = 0

        def __repr__(self):
            Text.spelled += 1
            return "text"

    with pytest.raises(BadInput, match=r"^tokens=\[text, text, "):
        as_stream([Text()] * 1000)
    assert Text.spelled < 10


def test_check_vocabulary():
    check_vocabulary(np.array([0, 256], np.uint16), 257)
    check_vocabulary(np.array([], np.uint16), 257)
    with pytest.raises(BadInput, match=r"a\.txt: token id 300 at position 2 lies outside the vocabulary of 257"):
        check_vocabulary(np.array([1, 256, 300, 400], np.uint16), 257, "a.txt")
    with pytest.raises(BadInput, match="token id 257 at position 1"):
        check_vocabulary(np.array([0, 257]), 257)
    with pytest.raises(BadInput, match="token id -1 at position 1"):
        check_vocabulary(np.array([0, -1]), 257)


def test_batches_are_fast():
    """Far below a training step: about 0.2 ms of this process's own time, of which others take none; the best of many
    counts."""
    batches = training_batches(stream(1_000_000), context=64, batch_size=12, end_of_text=3, separate_documents=True)
    best = float("inf")
    for step in range(50):
        started = time.process_time()
        batches[step]
        best = min(best, time.process_time() - started)
    assert best < 5e-3
