"""What every decoder has in common with transformers' model of it: one set of tests, which each architecture runs.

A test file derives `class Test...(SameAsTransformers)` and gives it a fixture `pair`. Weights are random, norms and
biases moved off 1 and 0. Float32 noise between two correct implementations is about 1e-5 on the logits.
"""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmq_jax.generation.generate import generate
from llmq_jax.generation.sampling import Sampler
from llmq_jax.interop import config_from_hf, from_state_dict, to_state_dict
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import build, override
from llmq_jax.objectives.next_token import NextToken
from tests.parity.references import assert_same_gradients, numpy_gradients, numpy_state, randomise

LOGITS, LOSS = 1e-4, 1e-5
LENGTH = 40


def make_pair(model_type: str, fields: dict, **ours):
    """(transformers' model with random weights, ours with the same); `ours` are changes of our config."""
    config = transformers.AutoConfig.for_model(model_type, **fields, bos_token_id=0, eos_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(theirs)
    our_config = config_from_hf(config.to_dict())
    lm = LanguageModel(our_config, build(our_config), from_state_dict(numpy_state(theirs), our_config))
    return theirs, lm.replace(config=override(our_config, **ours)) if ours else lm


def draw_tokens(lm, batch=3, length=LENGTH):
    return np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, length))


def their_logits(model, tokens, **inputs):
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in inputs.items()}
        return model(input_ids=torch.tensor(tokens), use_cache=False, **inputs).logits.float().numpy()


def packed(lm):
    """Tokens, document numbers and positions of rows that hold two or three documents each."""
    tokens = draw_tokens(lm)
    segment_ids = np.array([[1] * 17 + [2] * 23, [1] * 5 + [2] * 20 + [3] * 15, [1] * 39 + [2]])
    starts = np.array([[np.argmax(row == document) for document in row] for row in segment_ids])
    return tokens, segment_ids, np.arange(LENGTH) - starts


def batches(lm):
    """What is common to both sides: (tokens, labels with -100 where nothing counts, their inputs, our inputs)."""
    tokens, lengths = draw_tokens(lm), np.array([LENGTH, 13, 2])
    right = np.arange(LENGTH) < lengths[:, None]
    left = right[:, ::-1]
    left_positions = np.maximum(np.cumsum(left, axis=1) - 1, 0)
    _, segment_ids, positions = packed(lm)
    starts = np.diff(segment_ids, axis=1, prepend=0) != 0
    return {
        "plain": (tokens, tokens, {}, {}),
        "right padding": (
            tokens,
            np.where(right, tokens, -100),
            {"attention_mask": right.astype(int)},
            {"segment_ids": right, "positions": np.tile(np.arange(LENGTH), (3, 1))},
        ),
        "left padding": (
            tokens,
            # The first real token follows padding: it is no target.
            np.where(left & (left_positions > 0), tokens, -100),
            {"attention_mask": left.astype(int), "position_ids": left_positions},
            {"segment_ids": left, "positions": left_positions},
        ),
        "packed": (
            tokens,
            np.where(starts, -100, tokens),
            {"position_ids": positions},
            {"segment_ids": segment_ids, "positions": positions},
        ),
    }


def assert_close(found, expected):
    """Within LOGITS, which is for logits of a standard deviation of up to 3; rounding grows with them."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS * max(1.0, np.std(expected) / 3))


def assert_same_logits(pair):
    theirs, ours = pair
    tokens = draw_tokens(ours)
    expected = their_logits(theirs, tokens)
    assert expected.std() > 1, "logits this flat would hide a fault"
    assert_close(ours.logits(tokens), expected)


def assert_same_loss_and_gradients(pair, kind="plain"):
    theirs, ours = pair
    tokens, labels, their_inputs, our_inputs = batches(ours)[kind]
    theirs.zero_grad()
    their_inputs = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in their_inputs.items()}
    expected = theirs(input_ids=torch.tensor(tokens), labels=torch.tensor(labels), use_cache=False, **their_inputs).loss
    expected.backward()

    # They read the last token too, which has no target.
    targets = np.append(labels[:, 1:], np.full_like(labels[:, :1], -100), axis=1)
    batch = {
        "tokens": tokens,
        "targets": np.maximum(targets, 0),
        "mask": (targets >= 0).astype(np.float32),
        **{name: value.astype(np.int32) for name, value in our_inputs.items()},
    }
    loss, gradients = loss_and_gradients(ours.model, ours.variables, batch)
    assert abs(float(loss) - expected.item()) < LOSS
    assert_same_gradients_by_name(gradients, ours.config, theirs)


def assert_same_gradients_by_name(gradients, config, theirs):
    """Ours as a tree of variables; what is a buffer of theirs has none."""
    found = to_state_dict(gradients, config)
    for name in [name for name, _ in theirs.named_buffers() if name in found]:
        assert not found.pop(name).any()
    assert_same_gradients(found, numpy_gradients(theirs, found))


@partial(jax.jit, static_argnums=0)  # compiled once for all batches that are told positions and segments
def loss_and_gradients(model, variables, batch):
    objective = NextToken(model)
    return jax.value_and_grad(lambda v: objective.loss(v, batch, objective.weights(batch))[0])(variables)


class SameAsTransformers:
    """Tests of `pair`: (transformers' model, ours with the same weights)."""

    def test_logits(self, pair):
        assert_same_logits(pair)

    @pytest.mark.product("ways to read")
    def test_padding(self, pair):
        """On the right, and on the left, where transformers needs position_ids if positions are learned: without, its
        logits are off by more than 1."""
        theirs, ours = pair
        tokens, lengths = draw_tokens(ours), np.array([LENGTH, 13, 1])
        real = np.arange(LENGTH) < lengths[:, None]
        expected = their_logits(theirs, tokens, attention_mask=real.astype(int))
        found = ours.logits(tokens, lengths=lengths)
        assert np.isfinite(found).all()
        assert_close(found[real], expected[real])

        real = np.arange(LENGTH) >= LENGTH - lengths[:, None]
        positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
        expected = their_logits(theirs, tokens, attention_mask=real.astype(int), position_ids=positions)
        found = ours.logits(tokens, segment_ids=real.astype(int))
        assert_close(found[real], expected[real])

    @pytest.mark.product("ways to read")
    def test_packed_rows(self, pair):
        theirs, ours = pair
        tokens, segment_ids, positions = packed(ours)
        expected = their_logits(theirs, tokens, position_ids=positions)
        assert_close(ours.logits(tokens, segment_ids=segment_ids), expected)
        # And each document is what it is alone: with padding after it, in a program that is there already.
        alone = ours.logits(np.roll(tokens, -5, axis=1), lengths=[20] * len(tokens))[1, :20]
        found = ours.logits(tokens, segment_ids=segment_ids)[1, 5:25]
        assert_close(found, alone)

    @pytest.mark.product("ways to read")
    def test_past_a_cache(self, pair):
        """A prefix is read into the cache, the rest follows in one piece and then token by token. Hidden states of the
        prefix follow the final norm."""
        theirs, ours = pair
        tokens = draw_tokens(ours)
        with torch.no_grad():
            prefix = theirs(input_ids=torch.tensor(tokens[:, :25]), use_cache=True)
            cache = getattr(prefix, "cache", None) or prefix.past_key_values
            name = "cache" if hasattr(prefix, "cache") else "past_key_values"
            hidden = theirs.base_model(input_ids=torch.tensor(tokens[:, :25])).last_hidden_state.numpy()
            expected = theirs(input_ids=torch.tensor(tokens[:, 25:]), **{name: cache}).logits.numpy()

        model, variables = ours.model, ours.variables

        @jax.jit
        def prefill(tokens):
            caches = model.create_caches(3, LENGTH, jnp.float32)
            return model.apply(variables, tokens, caches=caches, method="forward")

        @jax.jit
        def decode(tokens, positions, caches):
            output = model.decode(outside, layers, tokens, positions, caches)
            return model.apply(outside, output.hidden, method="unembed"), output.caches

        outside, layers = model.slice_layers(variables)
        output = prefill(jnp.asarray(tokens[:, :25]))
        assert_close(output.hidden, hidden)
        caches = model.slice_caches(output.caches)
        found = []
        for start, end in [(25, 33), *((i, i + 1) for i in range(33, LENGTH))]:
            positions = jnp.broadcast_to(jnp.arange(start, end), (3, end - start))
            logits, caches = decode(jnp.asarray(tokens[:, start:end]), positions, caches)
            found.append(logits)
        assert_close(np.concatenate(found, axis=1), expected)

    @pytest.mark.parametrize("kinds", [["plain"], ["right padding", "left padding", "packed"]], ids=",".join)
    @pytest.mark.product
    def test_loss_and_gradients(self, pair, kinds):
        """In one program: those that are told positions and segments."""
        for kind in kinds:
            assert_same_loss_and_gradients(pair, kind)

    @pytest.mark.product("ways to read")
    def test_the_dtype_of_the_file_is_computed_in(self, pair):
        """bfloat16 on both sides: compared as distributions, since single logits are good to two or three digits."""
        theirs, ours = pair
        tokens = draw_tokens(ours, batch=24)  # many: a router's near-tie, decided otherwise, moves a row by as much
        narrow = ours.replace(variables=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours.variables))
        hidden = jax.eval_shape(lambda: narrow.model.apply(narrow.variables, jnp.asarray(tokens), method="hidden"))
        assert hidden.dtype == jnp.bfloat16
        exact = jax.nn.log_softmax(their_logits(theirs, tokens))

        def divergence(logits):
            return (np.exp(exact) * (exact - jax.nn.log_softmax(logits))).sum(-1).mean()

        their_own = divergence(their_logits(copy.deepcopy(theirs).bfloat16(), tokens))
        assert divergence(narrow.logits(tokens)) < max(1e-2, 1.5 * their_own)

    @pytest.mark.product("ways to read")
    def test_greedy_tokens_equal_those_of_transformers(self, pair):
        """Prompts of unequal length in one batch give each what transformers gives it alone."""
        theirs, ours = pair
        tokens = draw_tokens(ours)
        prompts = [tokens[0, :9].tolist(), tokens[1, :1].tolist(), tokens[2, :14].tolist()]
        found = generate(ours, prompts, max_new_tokens=12, sampler=Sampler(temperature=0.0))
        for row, prompt in enumerate(prompts):
            expected = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            np.testing.assert_array_equal(found.tokens[row], expected[0, len(prompt) :].numpy())
