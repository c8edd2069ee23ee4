"""GPT-2 against transformers' GPT2LMHeadModel: logits, loss and gradients, padded, packed and past a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmq_jax.generation.generate import generate
from llmq_jax.generation.sampling import Sampler
from llmq_jax.interop import config_from_hf, config_to_hf, from_state_dict, to_state_dict
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import build
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.objectives.next_token import NextToken
from tests.parity.references import assert_same_gradients, numpy_gradients, numpy_state, randomise

LOGITS, LOSS = 1e-4, 1e-5

CONFIGS = {
    "tied": {"vocab_size": 101, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    # Every field away from its default.
    "untied": {
        "vocab_size": 97,
        "n_positions": 48,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 3,
        "n_inner": 40,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-2,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """(transformers' model, ours with the same weights)."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        **CONFIGS[request.param], **no_dropout, bos_token_id=0, eos_token_id=0, attn_implementation="eager"
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    randomise(theirs)
    our_config = config_from_hf(config.to_dict())
    return theirs, LanguageModel(our_config, build(our_config), from_state_dict(numpy_state(theirs), our_config))


def draw_tokens(lm, batch=3, length=40):
    return np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, length))


def their_logits(model, tokens, **inputs):
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in inputs.items()}
        return model(input_ids=torch.tensor(tokens), use_cache=False, **inputs).logits.numpy()


def test_logits(pair):
    theirs, ours = pair
    tokens = draw_tokens(ours)
    expected = their_logits(theirs, tokens)
    assert expected.std() > 1, "logits this flat would hide a fault"
    np.testing.assert_allclose(ours.logits(tokens), expected, rtol=0, atol=LOGITS)


def test_hidden_states_follow_the_final_norm(pair):
    theirs, ours = pair
    tokens = draw_tokens(ours)
    with torch.no_grad():
        expected = theirs.transformer(input_ids=torch.tensor(tokens)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.hidden(tokens), expected, rtol=0, atol=LOGITS)


def test_right_padding(pair):
    theirs, ours = pair
    tokens, lengths = draw_tokens(ours), np.array([40, 13, 1])
    real = np.arange(40) < lengths[:, None]
    expected = their_logits(theirs, tokens, attention_mask=real.astype(int))
    found = ours.logits(tokens, lengths=lengths)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=LOGITS)


def test_left_padding(pair):
    """transformers needs position_ids here: without them its own logits are off by more than 1."""
    theirs, ours = pair
    tokens, lengths = draw_tokens(ours), np.array([40, 13, 1])
    real = np.arange(40) >= 40 - lengths[:, None]
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    expected = their_logits(theirs, tokens, attention_mask=real.astype(int), position_ids=positions)
    found = ours.logits(tokens, segment_ids=real.astype(int))
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=LOGITS)
    given = ours.logits(tokens, positions=positions, segment_ids=real.astype(int))
    np.testing.assert_allclose(given[real], expected[real], rtol=0, atol=LOGITS)


def packed(lm):
    """Tokens, document numbers and positions of rows that hold two or three documents each."""
    tokens = draw_tokens(lm)
    segment_ids = np.array([[1] * 17 + [2] * 23, [1] * 5 + [2] * 20 + [3] * 15, [1] * 39 + [2]])
    starts = np.array([[np.argmax(row == document) for document in row] for row in segment_ids])
    return tokens, segment_ids, np.arange(40) - starts


def test_packed_rows(pair):
    theirs, ours = pair
    tokens, segment_ids, positions = packed(ours)
    expected = their_logits(theirs, tokens, position_ids=positions)
    np.testing.assert_allclose(ours.logits(tokens, segment_ids=segment_ids), expected, rtol=0, atol=LOGITS)
    # And each document is what it is alone.
    alone = ours.logits(tokens[1:2, 5:25])
    np.testing.assert_allclose(ours.logits(tokens, segment_ids=segment_ids)[1:2, 5:25], alone, rtol=0, atol=LOGITS)


def test_past_a_cache(pair):
    """A prefix is read into the cache, the rest follows in one piece and then token by token."""
    theirs, ours = pair
    tokens = draw_tokens(ours)
    with torch.no_grad():
        prefix = theirs(input_ids=torch.tensor(tokens[:, :25]), use_cache=True)
        cache = getattr(prefix, "cache", None) or prefix.past_key_values
        name = "cache" if hasattr(prefix, "cache") else "past_key_values"
        expected = theirs(input_ids=torch.tensor(tokens[:, 25:]), **{name: cache}).logits.numpy()

    model, variables = ours.model, ours.variables

    @jax.jit
    def prefill(tokens):
        caches = model.create_caches(3, 40, jnp.float32)
        return model.apply(variables, tokens, caches=caches, method="forward").caches

    @jax.jit
    def decode(tokens, positions, caches):
        hidden, caches = model.decode(outside, layers, tokens, positions, caches)
        return model.apply(outside, hidden, method="unembed"), caches

    outside, layers = model.slice_layers(variables)
    caches = model.slice_caches(prefill(jnp.asarray(tokens[:, :25])))
    found = []
    for start, end in [(25, 33), *((i, i + 1) for i in range(33, 40))]:
        positions = jnp.broadcast_to(jnp.arange(start, end), (3, end - start))
        logits, caches = decode(jnp.asarray(tokens[:, start:end]), positions, caches)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=LOGITS)


def batches(lm):
    """What is common to both sides: (tokens, labels with -100 where nothing counts, their inputs, our inputs)."""
    tokens, lengths = draw_tokens(lm), np.array([40, 13, 2])
    right = np.arange(40) < lengths[:, None]
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
            {"segment_ids": right},
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


@pytest.mark.parametrize("kind", ["plain", "right padding", "left padding", "packed"])
def test_loss_and_gradients(pair, kind):
    theirs, ours = pair
    tokens, labels, their_inputs, our_inputs = batches(ours)[kind]
    theirs.zero_grad()
    their_inputs = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in their_inputs.items()}
    expected = theirs(input_ids=torch.tensor(tokens), labels=torch.tensor(labels), use_cache=False, **their_inputs).loss
    expected.backward()

    batch = {
        "tokens": tokens[:, :-1],
        "targets": np.maximum(labels, 0)[:, 1:],
        "mask": (labels[:, 1:] >= 0).astype(np.float32),
        **{name: value[:, :-1].astype(np.int32) for name, value in our_inputs.items()},
    }
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    objective = NextToken(ours.model)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(variables):
        return objective.loss(variables, batch, objective.weights(batch))[0]

    loss, gradients = loss_and_gradients(ours.variables)
    assert abs(float(loss) - expected.item()) < LOSS
    assert_same_gradients(to_state_dict(gradients, ours.config), numpy_gradients(theirs))


def test_the_dtype_of_the_file_is_computed_in(pair):
    """bfloat16 on both sides: compared as distributions, since single logits are good to two or three digits."""
    theirs, ours = pair
    tokens = draw_tokens(ours)
    narrow = ours.replace(variables=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours.variables))
    hidden = jax.eval_shape(lambda: narrow.model.apply(narrow.variables, jnp.asarray(tokens), method="hidden"))
    assert hidden.dtype == jnp.bfloat16
    exact = jax.nn.log_softmax(their_logits(theirs, tokens))
    found = jax.nn.log_softmax(narrow.logits(tokens))
    divergence = (np.exp(exact) * (exact - found)).sum(-1)
    assert divergence.mean() < 1e-2


def test_config_defaults_are_those_of_transformers():
    assert config_from_hf({"model_type": "gpt2"}) == GPT2Config()
    assert config_from_hf(transformers.GPT2Config().to_dict()) == GPT2Config()


def test_exported_config_is_understood_by_transformers():
    ours = GPT2Config(
        vocab_size=11,
        max_position_embeddings=12,
        hidden_size=10,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=17,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
        embd_pdrop=0.2,
        attn_pdrop=0.3,
        resid_pdrop=0.4,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    values = config_to_hf(ours)
    theirs = transformers.GPT2Config(**values)
    assert theirs.to_dict().items() >= {k: v for k, v in values.items() if k != "architectures"}.items()
    assert set(values) <= set(transformers.GPT2Config().to_dict()), "a field that transformers does not have"
    assert config_from_hf(theirs.to_dict()) == ours


def test_greedy_tokens_equal_those_of_transformers(pair):
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
