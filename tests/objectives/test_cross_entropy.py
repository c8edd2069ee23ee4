from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.objectives import chunked_cross_entropy, cross_entropy, token_losses
from llmq_jax.objectives.chunks import chunk_tokens


def unembed(head, rows):
    return 30.0 * jnp.tanh(rows @ head["kernel"] / 30.0)  # not linear, as in models that cap their logits


def plain(head, hidden, targets, mask):
    logits = unembed(head, hidden.reshape(-1, hidden.shape[-1]))
    return jnp.sum(mask.reshape(-1) * token_losses(logits, targets.reshape(-1)))


def draw(vocabulary=37, tokens=(3, 7), width=6):
    keys = jax.random.split(jax.random.key(0), 4)
    head = {"kernel": jax.random.normal(keys[0], (width, vocabulary))}
    hidden = jax.random.normal(keys[1], (*tokens, width))
    targets = jax.random.randint(keys[2], tokens, 0, vocabulary)
    mask = jax.random.bernoulli(keys[3], 0.6, tokens).astype(jnp.float32)
    return head, hidden, targets, mask


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 21, 100])
def test_value_and_gradients_equal_the_plain_form(chunk_size):
    head, hidden, targets, mask = draw()

    def chunked(head, hidden):
        # A coefficient after the sum must reach the gradients that were formed in the forward pass.
        return 0.37 * chunked_cross_entropy(unembed, head, hidden, targets, mask, chunk_size=chunk_size)

    wanted = jax.value_and_grad(lambda h, x: 0.37 * plain(h, x, targets, mask), argnums=(0, 1))(head, hidden)
    got = jax.value_and_grad(chunked, argnums=(0, 1))(head, hidden)
    np.testing.assert_allclose(chunked(head, hidden), wanted[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, wanted)


@pytest.mark.parametrize("differentiated", [False, True])
def test_chunks_of_prompts_and_padding_are_not_unembedded(differentiated):
    """Wherever in the rows the tokens that count stand: 6 of 24 fill two chunks of 4."""
    head, hidden, targets, _ = draw(tokens=(3, 8))
    mask = jnp.zeros((3, 8)).at[0, 6:].set(1.0).at[1, ::3].set(1.0).at[2, 5].set(1.0)
    rows = []

    def counted(head, each):
        jax.debug.callback(lambda each: rows.append(len(each)), each)
        return unembed(head, each)

    def chunked(head, hidden):
        return chunked_cross_entropy(counted, head, hidden, targets, mask, chunk_size=4)

    jax.block_until_ready((jax.grad(chunked) if differentiated else chunked)(head, hidden))
    jax.effects_barrier()
    assert rows == [4, 4]


def test_no_token_costs_nothing():
    head, hidden, targets, mask = draw(tokens=(3, 0))
    loss = partial(chunked_cross_entropy, unembed, targets=targets, mask=mask)
    value, gradients = jax.value_and_grad(lambda head: loss(head, hidden))(head)
    assert float(loss(head, hidden)) == float(value) == 0 and not gradients["kernel"].any()


def test_gradients_of_a_head_in_bfloat16_add_up_in_float32():
    """Of as many chunks as there are tokens: in bfloat16 the sum stands still where a chunk adds less than its half
    step."""
    head, hidden, targets, mask = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, draw(tokens=(1, 600))
    )
    hidden = jnp.broadcast_to(hidden[:, :1], hidden.shape)
    targets, mask = jnp.zeros_like(targets), jnp.ones(mask.shape)

    @partial(jax.grad, argnums=0)
    def gradient(head, size):
        return chunked_cross_entropy(unembed, head, hidden, targets, mask, chunk_size=size)

    one, many = gradient(head, 600)["kernel"], gradient(head, 1)["kernel"]
    assert one.dtype == many.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(many), np.float32(one), rtol=0, atol=0.01 * float(jnp.abs(one).max()))


def test_what_is_added_to_the_loss_of_a_token_has_a_gradient(monkeypatch):
    """A z-loss, say, by an edit of `token_losses` alone."""
    head, hidden, targets, mask = draw()

    def more(logits, targets):
        return token_losses(logits, targets) + 0.1 * jax.nn.logsumexp(logits, axis=-1) ** 2

    def plain_with_more(head, hidden):
        logits = unembed(head, hidden.reshape(-1, hidden.shape[-1]))
        return jnp.sum(mask.reshape(-1) * more(logits, targets.reshape(-1)))

    wanted = jax.value_and_grad(plain_with_more, argnums=(0, 1))(head, hidden)
    monkeypatch.setattr(cross_entropy, "token_losses", more)

    def chunked(head, hidden):
        return chunked_cross_entropy(unembed, head, hidden, targets, mask, chunk_size=4)

    got = jax.value_and_grad(chunked, argnums=(0, 1))(head, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, wanted)


def test_token_losses_are_minus_log_softmax():
    logits = jnp.array([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(token_losses(logits, jnp.array([1, 2])), [1000.0, np.log(3.0)])
    # Of a target that there is not: the logarithm of the sum alone, finite where the logit in its place is not.
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf]] * 2)
    np.testing.assert_array_equal(token_losses(logits, jnp.array([-100, 3])), [0.0, 0.0])


def test_targets_outside_the_vocabulary_do_no_harm_where_nothing_counts():
    head, hidden, targets, mask = draw(vocabulary=10, tokens=(2, 6), width=4)
    mask = jnp.ones_like(mask).at[:, 4:].set(0)
    outside = targets.at[0, 4:].set(-100).at[1, 4:].set(10)

    def value_and_gradients(targets, chunk_size):
        def loss(head, hidden):
            return chunked_cross_entropy(unembed, head, hidden, targets, mask, chunk_size=chunk_size)

        return jax.value_and_grad(loss, argnums=(0, 1))(head, hidden)

    for chunk_size in (5, 12):
        found, expected = value_and_gradients(outside, chunk_size), value_and_gradients(targets, chunk_size)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_memory_stays_far_below_the_logits():
    head, hidden, targets, mask = draw(vocabulary=20_000, tokens=(4, 512), width=16)

    def temporary_bytes(loss):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = temporary_bytes(lambda h, x: chunked_cross_entropy(unembed, h, x, targets, mask, chunk_size=128))
    assert chunked < temporary_bytes(lambda h, x: plain(h, x, targets, mask)) / 4


@pytest.mark.parametrize(
    ("backend", "vocabulary", "tokens"),
    [("cpu", 50257, 667), ("cpu", 128256, 261), ("gpu", 50257, 4096), ("tpu", 128256, 1024), ("tpu", 2**28, 128)],
)
def test_an_accelerator_takes_few_chunks(backend, vocabulary, tokens, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert chunk_tokens(vocabulary, elements={"cpu": 2**25, "gpu": 2**28, "tpu": 2**27}, shortest=128) == tokens
