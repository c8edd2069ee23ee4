import pytest

from llmq_jax.data import SomeBatches
from llmq_jax.errors import BadInput


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6]),
        (9, [0, 1, 2, 3, 4, 5, 6]),
        (5, [0, 1, 2, 4, 5]),
        (3, [0, 2, 4]),
        (1, [0]),
    ],
)
def test_they_are_spread_evenly_and_the_same_each_time(most, expected):
    some = SomeBatches(range(7), most)
    assert len(some) == len(expected)
    assert list(some) == list(some) == expected
    with pytest.raises(IndexError, match=f"batch {len(expected)} of {len(expected)}"):
        some[len(expected)]


def test_none_is_too_few():
    with pytest.raises(BadInput, match="most is 0 and must be at least 1"):
        SomeBatches(range(7), 0)
