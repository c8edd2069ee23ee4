import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmq_jax.data import split_documents, split_tokens
from llmq_jax.data.splits import seeded_order, shuffled_epochs
from llmq_jax.errors import BadInput


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 2**40))
@example(2, 0.9, 0)  # one stays for training
def test_documents_are_parted(count, fraction, seed):
    documents = list(range(count))
    training, held_out = split_documents(documents, fraction, seed)
    assert sorted(training + held_out) == documents
    assert training == sorted(training)
    assert held_out == sorted(held_out)
    assert len(training) >= 1
    assert len(held_out) == min(max(1, round(fraction * count)), count - 1)
    assert split_documents(documents, fraction, seed) == (training, held_out)


def test_the_seed_chooses():
    held_out = {tuple(split_documents(range(100), 0.1, seed)[1]) for seed in range(20)}
    assert len(held_out) == 20
    # Uniform: every document has its chance. A document is missed by 20 draws of a tenth with probability 0.12.
    assert len(set().union(*held_out)) > 70


def test_a_seed_shuffles_epochs_as_it_always_did():
    """A run that is resumed by a later version must find the same order."""
    for entropy, expected in ((3, "03124 30412 21304"), ([3, 1], "41023 21340 40123")):
        order = shuffled_epochs(5, entropy)
        assert " ".join("".join(str(order[5 * epoch + i]) for i in range(5)) for epoch in range(3)) == expected
    assert seeded_order(5, 3).tolist() == [4, 3, 0, 1, 2]
    assert seeded_order(5, [3, 1]).tolist() == [4, 1, 3, 2, 0]


def test_the_last_tenth_of_a_text_as_nanogpt_takes_it():
    tokens = np.arange(1_115_394, dtype=np.uint32)  # tinyshakespeare's length
    training, held_out = split_tokens(tokens, 0.1)
    assert len(training) == int(1_115_394 * 0.9) == 1_003_854
    assert held_out[0] == 1_003_854
    assert held_out[-1] == 1_115_393
    assert np.shares_memory(training, tokens)
    assert [len(part) for part in split_tokens(np.arange(10), 0.1)] == [9, 1]
    assert [len(part) for part in split_tokens(np.arange(10), 0.9)] == [1, 9], "1 - 0.9 is 0.09999999999999998"


def test_bad_splits():
    with pytest.raises(BadInput, match="at least 2"):
        split_documents(["one"], 0.1)
    for fraction in (0.0, 1.0, -0.5, 1.5):
        with pytest.raises(BadInput, match="between 0 and 1"):
            split_documents(["one", "two"], fraction)
        with pytest.raises(BadInput, match="between 0 and 1"):
            split_tokens(np.arange(10), fraction)
    with pytest.raises(BadInput, match="1 token: too few"):
        split_tokens(np.arange(1), 0.1)
    with pytest.raises(BadInput, match="10 tokens: too few"):
        split_tokens(np.arange(10), 1e-9)
