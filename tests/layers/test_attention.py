import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.layers.attention import Context, attend, lean_attend, self_attention, visible


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


@pytest.mark.parametrize("query_block", [4, 11])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lean_blocks_equal_the_reference_with_gradients(groups, query_block):
    inputs = draw(1, groups=groups)
    context = Context(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
    mask = visible(context.positions, context.positions, context.segment_ids, context.segment_ids)

    def plain(inputs):
        return jnp.sum(jnp.sin(attend(*inputs, mask, scale=0.4)))

    def lean(inputs):
        return jnp.sum(jnp.sin(self_attention(*inputs, context, scale=0.4, query_block=query_block)))

    reference, wanted = jax.value_and_grad(plain)(inputs)
    value, got = jax.value_and_grad(lean)(inputs)
    np.testing.assert_allclose(value, reference, rtol=1e-6)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_lean_attention_in_bfloat16_is_about_as_near_as_the_reference():
    inputs = [x.astype(jnp.bfloat16) for x in draw(3)]
    mask = jnp.tril(jnp.ones((2, 11, 11), bool))

    def gradients(function, inputs):
        return jax.grad(lambda inputs: function(inputs).astype(jnp.float32).sum())(inputs)

    def plain(inputs):
        return attend(*inputs, mask, scale=0.3)

    def lean(inputs):
        return lean_attend(*inputs, mask, 0.3)

    exact = gradients(plain, [x.astype(jnp.float32) for x in inputs])
    for ours, theirs, true in zip(gradients(lean, inputs), gradients(plain, inputs), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.abs(ours - true).mean() < 2 * jnp.abs(theirs - true).mean()


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
