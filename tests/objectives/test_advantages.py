"""Advantages of answers and of their steps, by hand, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.objectives.advantages import group_advantages, process_advantages


def test_group_advantages_by_hand():
    rewards = jnp.asarray([1.0, 0.0, 0.0, 1.0, 2.0, 6.0, 2.0, 2.0])
    first, second = np.array([0.5, -0.5, -0.5, 0.5]), np.array([-1.0, 3.0, -1.0, -1.0])
    by_group = np.concatenate([first / (np.sqrt(1 / 3) + 1e-4), second / (2.0 + 1e-4)])
    np.testing.assert_allclose(group_advantages(rewards, 4), by_group, rtol=1e-6)
    centred = np.concatenate([first, second])
    np.testing.assert_allclose(group_advantages(rewards, 4, scale="none"), centred, rtol=1e-6)
    by_batch = centred / (np.std(np.asarray(rewards), ddof=1) + 0.5)
    np.testing.assert_allclose(group_advantages(rewards, 4, scale="batch", epsilon=0.5), by_batch, rtol=1e-6)
    np.testing.assert_array_equal(group_advantages(rewards, 1, scale="none"), np.zeros(8))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 1e-4])
def test_a_group_without_spread_has_advantages_of_exactly_0(scale, epsilon):
    """The mean of three times 1.7 is another number: a division by ε would make advantages of the rounding."""
    equal = jnp.full(6, 1.7)
    assert equal[:3].mean() != equal[0] and equal[:3].sum() / 3 != equal[0]
    np.testing.assert_array_equal(group_advantages(equal, 3, scale=scale, epsilon=epsilon), np.zeros(6))
    for other in (2.7, 0.0):
        mixed = group_advantages(equal.at[4].set(other), 3, scale=scale, epsilon=epsilon)
        np.testing.assert_array_equal(mixed[:3], np.zeros(3))
        assert (np.abs(mixed[3:]) > 0.1).all()


def test_process_advantages_by_hand():
    ends = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]])
    rewards = np.array([[9, 1, 9, 0], [2, 9, 9, 9], [9, 9, 3, 9], [1, 2, 9, 5.0]])
    expected = np.zeros((4, 4))
    for group in ([0, 1], [2, 3]):
        values = np.array([rewards[i, t] for i in group for t in range(4) if ends[i, t]])
        for i in group:
            for t in range(4):
                later = [rewards[i, j] - values.mean() for j in range(t, 4) if ends[i, j]]
                expected[i, t] = sum(later) / (values.std(ddof=1) + 1e-4)
    found = process_advantages(jnp.asarray(rewards), jnp.asarray(ends), 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found[1, 1] == 0 and found[2, 3] == 0  # after the last step
    # One step an answer, at its end: the outcome's advantage, on every token up to there.
    outcomes = jnp.asarray([1.0, 4.0, 0.0, 0.5])
    last = jnp.zeros((4, 3)).at[:, 2].set(1.0)
    found = process_advantages(last * outcomes[:, None], last, 4)
    np.testing.assert_allclose(found, np.repeat(group_advantages(outcomes, 4)[:, None], 3, axis=1), rtol=1e-6)


def test_process_advantages_without_spread_or_steps():
    ends = jnp.asarray([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(process_advantages(1.7 * ends, ends, 2, epsilon=0.0), np.zeros((6, 2)))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda x: group_advantages(x[:, 0], 3), "4 answers are no whole number of groups of 3"),
        (lambda x: group_advantages(x[:, 0], 0), "4 answers are no whole number of groups of 0"),
        (lambda x: group_advantages(x[:, 0], 1), "a group of one answer has no spread"),
        (lambda x: group_advantages(x[:, 0], 2, scale="groups"), "scale='groups' of advantages is unknown"),
        (lambda x: process_advantages(x, x, 3), "4 answers are no whole number of groups of 3"),
    ],
)
def test_what_cannot_be(attempt, message):
    with pytest.raises(BadInput) as error:
        attempt(jnp.zeros((4, 3)))
    assert message in str(error.value) and "\n" not in str(error.value)
