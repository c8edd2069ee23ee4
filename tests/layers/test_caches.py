"""Caches, through the attention that reads them: whatever is written in whatever pieces equals the whole sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.layers.attention import Context, attention
from llmq_jax.layers.caches import NOWHERE, FullCache, RingCache

LENGTH = 40


@pytest.fixture(scope="module")
def sequence():
    """Query, key and value, which is wider, as in differential attention."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((4, 4), (2, 4), (2, 6))
    return [jax.random.normal(key, (2, LENGTH, *shape)) for key, shape in zip(keys, shapes, strict=True)]


def whole(sequence, window):
    rows = Context(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)), implementation="masked")
    return attention(*sequence, rows, scale=0.7, window=window)[0]


def take(sequence, positions):
    """Query, key and value at positions [B, T]."""
    return [jnp.take_along_axis(x, positions[:, :, None, None], axis=1) for x in sequence]


@partial(jax.jit, static_argnames=("window", "name"))
def attend(inputs, positions, cache, window, segment_ids=None, name="auto"):
    context = Context(positions, segment_ids, implementation=name)
    return attention(*inputs, context, cache, scale=0.7, window=window)


def look(sequence, cache, positions, window, segment_ids=None, name="auto"):
    """One pass at the given positions: (mixed values, cache)."""
    positions = jnp.asarray(positions)
    inputs = take(sequence, jnp.where(positions < LENGTH, positions, 0))
    return attend(inputs, positions, cache, window, segment_ids, name)


def at(mixed, positions):
    return jnp.take_along_axis(mixed, jnp.asarray(positions)[:, :, None, None], axis=1)


def span(starts, count):
    return np.asarray(starts)[:, None] + np.arange(count)


def ring(length, window, lookahead=0):
    return RingCache.create(2, length, window, lookahead, 2, 4, jnp.float32, value_dim=6)


def full(length, *_):
    return FullCache.create(2, length, 2, 4, jnp.float32, value_dim=6)


PIECES = {
    "one by one": [1] * LENGTH,
    "a prompt, then one by one": [17] + [1] * (LENGTH - 17),
    "in pieces": [3, 4, 5, 10, 11, 4, 3],  # 5: one more than a lookahead of 3 is for
}


@pytest.mark.parametrize(
    ("name", "window", "lookahead"),
    [
        ("a prompt, then one by one", 1, 0),
        ("one by one", 5, 0),
        ("a prompt, then one by one", 5, 3),
        ("in pieces", 5, 3),
        ("in pieces", 64, 2),
    ],
)
def test_a_ring_equals_the_whole_sequence(sequence, name, window, lookahead):
    pieces = PIECES[name]
    expected, cache, start = whole(sequence, window), ring(LENGTH, window, lookahead), 0
    assert cache.values.shape[2] == min(LENGTH, window + lookahead)
    for count in pieces:
        positions = span([start, start], count)
        mixed, cache = look(sequence, cache, positions, window)
        np.testing.assert_allclose(mixed, at(expected, positions), atol=1e-5)
        start += count


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_full_cache_equals_the_whole_sequence(sequence, pieces):
    """In a layer with a window too."""
    for window in (None, 5):
        expected, cache, start = whole(sequence, window), full(LENGTH), 0
        for count in pieces:
            positions = span([start, start], count)
            mixed, cache = look(sequence, cache, positions, window)
            np.testing.assert_allclose(mixed, at(expected, positions), atol=1e-5)
            start += count


@pytest.mark.parametrize("create", [ring, full])
@pytest.mark.parametrize(("side", "name"), [("right", "auto"), ("left", "auto"), ("left", "plain")])
def test_padding_of_a_prompt_overwrites_nothing(sequence, create, side, name):
    """Prompts of 4 and 13 tokens in 15 places, then a second piece that is padded too, then decoding."""
    window, lengths, expected = 5, np.array([4, 13]), whole(sequence, 5)
    cache = create(LENGTH, window, 1)
    for starts, counts, width in (([0, 0], lengths, 15), (lengths, np.array([9, 2]), 9)):
        places = np.arange(width)[None] - (0 if side == "right" else width - counts[:, None])
        real = (places >= 0) & (places < counts[:, None])
        positions = np.where(real, np.asarray(starts)[:, None] + places, np.asarray(starts)[:, None] + places % width)
        mixed, cache = look(sequence, cache, positions, window, jnp.asarray(real, jnp.int32), name)
        wanted = at(expected, np.minimum(positions, LENGTH - 1))
        np.testing.assert_allclose(mixed[real], wanted[real], atol=1e-5)
    positions = lengths + np.array([9, 2])
    for step in range(8):
        mixed, cache = look(sequence, cache, span(positions + step, 1), window, name=name)
        np.testing.assert_allclose(mixed, at(expected, span(positions + step, 1)), atol=1e-5)


@pytest.mark.parametrize(("window", "lookahead"), [(3, 0), (1, 4), (8, 4), (5, 1)])
def test_rejected_drafts_leave_what_the_window_needs(sequence, window, lookahead):
    """Drafts of other tokens are written and all but some taken back, at a row's own place, up to the last position."""
    expected, rng = whole(sequence, window), np.random.default_rng(window + lookahead)
    other = [x[:, ::-1] for x in sequence]
    _, cache = look(sequence, ring(LENGTH, window, lookahead), span([0, 0], 6), window)
    positions = np.array([6, 6])
    while positions.max() + lookahead + 1 <= LENGTH:
        # One token that stays, and a draft of which each row keeps some.
        drafted = span(positions, lookahead + 1)
        kept = rng.integers(1, lookahead + 2, 2)
        inputs = [
            jnp.where((np.arange(lookahead + 1) < kept[:, None])[:, :, None, None], a, b)
            for a, b in zip(take(sequence, drafted), take(other, drafted), strict=True)
        ]
        mixed, cache = attend(inputs, jnp.asarray(drafted), cache, window)
        for row in range(2):
            wanted = expected[row, positions[row] : positions[row] + kept[row]]
            np.testing.assert_allclose(mixed[row, : kept[row]], wanted, atol=1e-5)
        positions = positions + kept


@pytest.mark.parametrize("create", [ring, full])
def test_drafts_past_the_last_position_overwrite_nothing(sequence, create):
    """A request of 10 positions, of which the window sees all: the ring has no more slots."""
    window, expected = 12, whole(sequence, 12)
    _, cache = look(sequence, create(10, window, 3), span([0, 0], 7), window)
    for start in (7, 8, 9):
        positions = span([start, start], 4)
        mixed, cache = look(sequence, cache, positions, window)
        np.testing.assert_allclose(mixed[:, : 10 - start], at(expected, positions[:, : 10 - start]), atol=1e-5)


def test_after_a_rollback_a_long_piece_does_not_see_what_was_taken_back(sequence):
    window, lookahead = 4, 2
    expected = whole(sequence, window)
    _, cache = look(sequence, ring(LENGTH, window, lookahead), span([0, 0], 9), window)
    drafted = jnp.asarray(span([9, 9], 2))
    wrong = [x[:, ::-1] for x in take(sequence, drafted)]
    _, cache = attend(wrong, drafted, cache, window)
    mixed, _ = look(sequence, cache, span([9, 9], 10), window)
    np.testing.assert_allclose(mixed, at(expected, span([9, 9], 10)), atol=1e-5)


def test_what_a_ring_holds():
    """Whichever way a row is written: a GPU puts tokens in any order, so that no two may have one slot."""
    empty = RingCache.create(2, 100, 3, 1, 1, 2, jnp.float32)
    assert empty.empty and (empty.positions == NOWHERE).all()
    tokens = jnp.arange(7.0)[None, None, :, None] * jnp.ones((2, 1, 1, 2))
    real = jnp.asarray([[1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]])
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    for order in (slice(None), slice(None, None, -1)):
        held = tokens[:, :, order]
        cache = empty.write(held, held, positions[:, order], real[:, order])
        assert not cache.empty
        np.testing.assert_array_equal(cache.positions, [[4, 5, 2, 3], [0, 1, NOWHERE, NOWHERE]])
        np.testing.assert_array_equal(cache.keys[0, 0, 0], [4, 5, 2, 3])
        np.testing.assert_array_equal(cache.values[1, 0, :, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("create", [ring, full])
def test_caches_grow(sequence, create):
    """From the length of the prompt to that of prompt and new tokens; a stack of layers' caches too."""
    window, expected = 5, whole(sequence, 5)
    for prompt in (3, 9):
        _, cache = look(sequence, create(prompt, window, 2), span([0, 0], prompt), window)
        grown = cache.extend(LENGTH)
        assert grown.values.shape[2] == (LENGTH if create is full else 7)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache).extend(LENGTH)
        for leaf, part in zip(jax.tree.leaves(stacked), jax.tree.leaves(grown), strict=True):
            np.testing.assert_array_equal(leaf[1], part)
        for position in range(prompt, LENGTH):
            mixed, grown = look(sequence, grown, span([position] * 2, 1), window)
            np.testing.assert_allclose(mixed, at(expected, span([position] * 2, 1)), atol=1e-5)


@pytest.mark.parametrize("heads, width, value_width", [(2, 8, 6), (1, 4, 6), (2, 4, None)])
def test_what_does_not_fit_into_the_cache_is_refused_by_name(sequence, heads, width, value_width):
    """A model with other keys or values than its base, whose `create_cache` is still that of the base."""
    cache = FullCache.create(2, LENGTH, heads, width, jnp.float32, value_width)
    of = f"{heads} heads of {width} features and values of {value_width or width}"
    told = rf"keys have 2 heads of 4 features and values of 6, but the cache is for {of}: .*`create_cache` of the block"
    with pytest.raises(BadInput, match=told):
        attention(*sequence, Context(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))), cache, scale=0.7)


def test_prefill_of_a_window_is_linear_in_the_length():
    def temporary(length):
        def prefill(x):
            rows = Context(jnp.broadcast_to(jnp.arange(length), (1, length)))
            cache = RingCache.create(1, length, 16, 0, 2, 8, jnp.float32)
            return attention(x, x, x, rows, cache, scale=1.0, window=16)

        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        return jax.jit(prefill).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 4.4 * temporary(512)
