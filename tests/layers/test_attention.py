import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.layers.attention import Context, self_attention


def draw(seed: int, heads: int = 4, groups: int = 2, length: int = 11):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(2, heads, length, 8), (2, groups, length, 8), (2, groups, length, 8)]
    return [2.0 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_hand(query, key, value, positions, segments, scale):
    """Row by row in NumPy: softmax over the keys that the definition allows."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    repeat = query.shape[1] // key.shape[1]
    for b, n, t in np.ndindex(query.shape[:3]):
        allowed = [
            s for s in range(key.shape[2]) if segments[b][s] == segments[b][t] and positions[b][s] <= positions[b][t]
        ]
        scores = np.array([query[b, n, t] @ key[b, n // repeat, s] for s in allowed]) * scale
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, n, t] = sum(w * value[b, n // repeat, s] for w, s in zip(weights, allowed, strict=True))
    return out


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32)


@pytest.mark.parametrize("query_block", [3, 4, 11])
def test_packed_and_padded_rows_equal_the_definition(query_block):
    query, key, value = draw(0)
    context = Context(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
    got = self_attention(query, key, value, context, scale=0.3, query_block=query_block)
    want = by_hand(query, key, value, POSITIONS, SEGMENTS, 0.3)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_of_queries_equal_the_reference_with_gradients(groups):
    inputs = draw(1, groups=groups)
    context = Context(jnp.broadcast_to(jnp.arange(11), (2, 11)))

    def loss(inputs, block):
        return jnp.sum(jnp.sin(self_attention(*inputs, context, scale=0.4, query_block=block)))

    reference, wanted = jax.value_and_grad(loss)(inputs, 11)
    value, got = jax.value_and_grad(loss)(inputs, 4)
    np.testing.assert_allclose(value, reference, rtol=1e-6)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_dropout_keeps_the_mean_and_follows_its_key():
    query, key, value = draw(2)
    context = Context(jnp.broadcast_to(jnp.arange(11), (2, 11)))

    def dropped(seed):
        return self_attention(
            query, key, value, context, scale=0.3, dropout_rate=0.25, dropout_key=jax.random.key(seed)
        )

    plain = self_attention(query, key, value, context, scale=0.3)
    assert not np.allclose(dropped(0), plain)
    np.testing.assert_array_equal(dropped(0), dropped(0))
    mean = jax.jit(lambda: jax.lax.map(dropped, jnp.arange(4000)).mean(0))()
    np.testing.assert_allclose(mean, plain, atol=0.15)
