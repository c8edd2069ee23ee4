import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.generation import Sampler
from llmq_jax.generation.sampling import (
    BLOCK,
    LEAST_TEMPERATURE,
    _where_reached,
    draw,
    first_largest,
    nucleus_edge,
    sample,
)


def kept(logits, **options):
    return np.isfinite(Sampler(**options).filter(jnp.asarray([logits], jnp.float32)))[0].tolist()


LOGITS = np.log([0.5, 0.25, 0.15, 0.1]).tolist()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [True] * 4),
        ({"top_k": 1}, [True, False, False, False]),
        ({"top_k": 2}, [True, True, False, False]),
        ({"top_k": 9}, [True] * 4),
        ({"top_p": 0.74}, [True, True, False, False]),
        ({"top_p": 0.76}, [True, True, True, False]),
        ({"top_p": 0.0}, [True, False, False, False]),
        ({"min_p": 0.4}, [True, True, False, False]),
        ({"min_p": 1.0}, [True, False, False, False]),
        # After top-k the two that stay hold 2/3 and 1/3: now 0.66 is reached by the first alone.
        ({"top_k": 2, "top_p": 0.66}, [True, False, False, False]),
        # The temperature acts first: at 0.1 the first token holds nearly everything.
        ({"temperature": 0.1, "top_p": 0.99}, [True, False, False, False]),
    ],
)
def test_filters(options, wanted):
    assert kept(LOGITS, **options) == wanted


@pytest.mark.parametrize(
    ("top_p", "backend"), [(0.1, "cpu"), (0.5, "gpu"), (0.9, "cpu"), (0.95, "gpu"), (0.95, "cpu"), (0.999, "gpu")]
)
def test_the_nucleus_is_that_of_sorting(top_p, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # it decides how many bits a pass finds
    logits = 4 * np.random.default_rng(1).normal(size=(3, 5000)).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    found = np.isfinite(Sampler(top_p=top_p).filter(jnp.asarray(logits)))
    for row, ours in zip(probabilities, found, strict=True):
        falling = np.sort(row)[::-1]
        count = np.searchsorted(np.cumsum(falling), top_p) + 1
        np.testing.assert_array_equal(ours, row >= falling[count - 1])


def test_equally_probable_tokens_stay_together():
    assert kept(np.log([0.4, 0.2, 0.2, 0.2]).tolist(), top_p=0.5) == [True] * 4


def test_what_reaches_p_is_the_whole_nucleus():
    assert nucleus_edge(jnp.asarray([[0.5, 0.25, 0.25]]), 0.5) == 0.5
    # The most probable token is in it, even where rounding leaves less than 1 - p in all.
    assert nucleus_edge(jnp.asarray([[0.5, 0.25]]), 0.125) == 0.5


def test_the_nucleus_is_found_without_sorting():
    """XLA's CPU backend takes as long to sort a vocabulary as SmolLM2 takes to decode a token."""
    program = jax.jit(Sampler(top_p=0.9).filter).lower(jnp.zeros((1, 64))).as_text()
    assert "sort" not in program


def test_frequencies_and_log_probabilities():
    sampler = Sampler(temperature=2.0, top_k=3)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (20_000, 4))
    tokens, logprobs = sample(logits, jax.random.split(jax.random.key(0), 20_000), sampler)
    probabilities = np.sqrt([0.5, 0.25, 0.15, 0.1])
    drawn = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(drawn, np.append(probabilities[:3] / probabilities[:3].sum(), 0), atol=0.015)
    # At the temperature, before top-k.
    np.testing.assert_allclose(logprobs, np.log(probabilities / probabilities.sum())[tokens], atol=1e-5)


def drawn_of(masses, count):
    rows = jnp.broadcast_to(jnp.asarray(masses, jnp.float32), (count, len(masses)))
    return np.bincount(jax.jit(draw)(rows, jax.random.split(jax.random.key(0), count)), minlength=len(masses))


def test_tokens_are_drawn_by_their_mass():
    """In several blocks, of which the last is not full and one holds nothing."""
    masses = np.random.default_rng(0).exponential(size=3 * BLOCK + 7)
    masses[BLOCK : 2 * BLOCK] = masses[::3] = 0.0
    drawn = drawn_of(masses, 50_000)
    assert not drawn[masses == 0].any()
    wanted = 50_000 * masses[masses > 0] / masses.sum()
    squares = ((drawn[masses > 0] - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert abs(squares - freedom) < 4 * np.sqrt(2 * freedom)


def test_a_share_that_rounding_keeps_from_being_reached_is_of_the_last_with_mass():
    assert _where_reached(jnp.asarray([[1.0, 2.0, 0.0]]), jnp.ones((1, 1))) == 1
    # Numbers from 0 up to below 1: half of them are below a half.
    assert _where_reached(jnp.asarray([[1.0, 1.0]]), jnp.full((1, 1), 0.5)) == 1


def test_a_sum_that_rounding_lets_grow_where_there_is_no_mass_draws_nothing_there():
    masses = np.random.default_rng(0).exponential(size=(64, 393)).astype(np.float32)
    masses[:, ::3] = 0.0
    sums = jnp.cumsum(masses, axis=-1)
    shares = (sums / sums[:, -1:]).reshape(-1, 1)  # just what is reached at each place
    masses = jnp.repeat(masses, masses.shape[1], axis=0)
    assert jnp.take_along_axis(masses, _where_reached(masses, shares)[:, None], axis=1).all()


@pytest.mark.parametrize("masses", [[np.nan] * (BLOCK + 1), [0.0] * (BLOCK + 1)])
def test_what_is_drawn_is_an_id_of_the_vocabulary_come_what_may(masses):
    assert drawn_of(masses, 8).shape == (BLOCK + 1,)


def test_the_first_largest_is_argmax():
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 5, (50, 33)).astype(np.float32))
    np.testing.assert_array_equal(first_largest(scores), jnp.argmax(scores, axis=-1))
    assert int(first_largest(jnp.full((1, 4), jnp.nan))[0]) in range(4)  # an id of the vocabulary, come what may


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.array([[0.0, 3.0, 3.0]], jnp.bfloat16)
    tokens, logprobs = sample(logits, jax.random.split(jax.random.key(0), 1), Sampler(0.0))
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(jnp.array([0.0, 3.0, 3.0]))[1], rtol=1e-6)


def test_a_temperature_near_0_is_as_good_as_greedy():
    """The least that is taken, and the next that is refused below; each row by its own largest logit."""
    logits = jnp.asarray([[1e4, -1e4, 9999.0], [-2.0, -1.0, -3.0]])
    for top_p in (0.9, 1.0):
        sampler = Sampler(LEAST_TEMPERATURE, top_p=top_p)
        tokens, logprobs = sample(logits, jax.random.split(jax.random.key(0), 2), sampler)
        assert tokens.tolist() == [0, 1] and logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": 1e-38}, "temperature=1e-38 is below 1e-30; take 0"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": -0.1}, "top_p=-0.1 must be between 0 and 1"),
        ({"min_p": 2.0}, "min_p=2.0 must be between"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive; 1 changes nothing"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be positive"),
        ({"temperature": 0.0, "top_k": 5}, "no effect at temperature 0"),
        ({"temperature": 0.0, "top_p": 0.9}, "no effect at temperature 0"),
        ({"temperature": 0.0, "min_p": 0.1}, "no effect at temperature 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        Sampler(**options)
