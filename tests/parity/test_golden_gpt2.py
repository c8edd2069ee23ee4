"""GPT-2 of the original repository: its weights through the layout `original` give the arrays that it computed.

It uses the exact GELU, as we do for its layout. What remains is its norm, which adds epsilon to the standard deviation
instead of the variance (docs/departures.md): at these weights at most 3e-4 on the logits, and with that norm in place
of ours nothing but rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from llmq_jax.generation.generate import generate
from llmq_jax.generation.sampling import Sampler
from llmq_jax.interop import from_state_dict, to_state_dict
from llmq_jax.layers.norms import NORMS
from tests.parity.golden import LOGITS, Golden

NAMES = ("gpt", "gpt_noqkvbias", "gpt_attn_mask", "gpt2_load")


def read(name):
    return Golden(name, state="out/state/" if name == "gpt2_load" else "param/")


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return read(request.param)


@pytest.fixture(scope="module")
def generated():
    return read("generate")


def test_the_config_is_theirs(golden):
    theirs, ours = golden.meta["cfg"], golden.config
    assert ours.vocab_size == theirs["vocab_size"]
    assert ours.max_position_embeddings == theirs["context_length"]
    assert ours.hidden_size == theirs["emb_dim"]
    assert ours.num_hidden_layers == theirs["n_layers"]
    assert ours.activation_function == "gelu"


def test_logits(golden):
    assert golden["out/logits"].std() > 0.5, "logits this flat would hide a fault"
    assert golden.difference() < LOGITS
    if "out/logits_last" in golden.arrays:
        last = golden.lm.logits(golden["in/x"])[:, -1]
        np.testing.assert_allclose(last, golden["out/logits_last"], rtol=0, atol=LOGITS)


def test_the_tanh_gelu_would_be_seen(golden):
    tanh = golden.lm.replace(config=dataclasses.replace(golden.config, activation_function="gelu_new"))
    assert np.abs(tanh.logits(golden["in/x"]) - golden.lm.logits(golden["in/x"])).max() > LOGITS


class EpsilonOutsideTheRoot(nn.Module):
    """The original's layer norm."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + self.epsilon) * scale + bias


@pytest.mark.parametrize("name", NAMES)
def test_what_remains_is_the_epsilon(name, monkeypatch):
    golden = read(name)
    monkeypatch.setitem(NORMS, "layer_norm", EpsilonOutsideTheRoot)
    with_theirs = golden.difference()
    monkeypatch.undo()
    assert with_theirs < 5e-6
    assert golden.difference() > 2 * with_theirs


@pytest.mark.parametrize("name", ["gpt", "gpt_noqkvbias", "gpt_attn_mask"])
def test_loss_and_gradients(name):
    golden = read(name)
    loss, ours = golden.loss_and_gradients()
    assert abs(loss - float(golden["out/loss"])) < 1e-5
    theirs = golden.under("grad/")
    if name != "gpt":
        assert not theirs  # kept for one of them
        return
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        difference = np.abs(ours[key] - expected).max()
        if key.endswith("w_keys.bias"):
            # It shifts all scores of a query alike: its gradient is zero, and what is there is rounding.
            assert np.abs(ours[key]).max() < 1e-7 and np.abs(expected).max() < 1e-7
        else:
            assert difference < 1e-4 * np.abs(expected).max(), key


def test_weights_go_back_as_they_came(golden):
    exported = to_state_dict(golden.lm.variables, golden.config, "original")
    state = {name: array for name, array in golden.state.items() if not name.endswith(".mask")}
    for name, array in state.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)
    added = exported.keys() - state.keys()
    assert bool(added) == (not golden.meta["cfg"]["qkv_bias"])
    assert all(name.endswith((".w_queries.bias", ".w_keys.bias", ".w_values.bias")) for name in added)
    assert not any(exported[name].any() for name in added)


def test_openai_s_weights_end_up_where_the_original_puts_them():
    """The original's loader nests OpenAI's variables, squeezes them and drops `model/`; here they get that back."""
    golden = read("gpt2_load")
    state = {}
    for name, array in golden.under("in/tf/").items():
        name = name.replace("blocks/", "h") if "/" in name or name[0] == "w" else f"ln_f/{name}"
        state[f"model/{name}"] = array[None] if name.endswith("/w") else array
    variables = from_state_dict(state, golden.config, "openai")
    assert golden.config.tie_word_embeddings  # they copy the embedding into the head
    jax.tree.map(np.testing.assert_array_equal, variables, golden.lm.variables)


# Generation.


def next_logits(lm, tokens, width):
    """Logits [B, V] of what follows, computed at one width, so that one program serves all lengths."""
    count = tokens.shape[1]
    padded = np.pad(tokens, ((0, 0), (0, width - count)))
    return lm.logits(padded, lengths=np.full(len(tokens), count))[:, count - 1]


def test_greedy_tokens(generated):
    prompts = generated["in/x"].tolist()
    found = generate(generated.lm, prompts, max_new_tokens=generated.meta["max_gen"], sampler=Sampler(temperature=0.0))
    for name in ("generate_simple", "greedy", "greedy_topk"):
        np.testing.assert_array_equal(found.tokens, generated[f"out/{name}"][:, len(prompts[0]) :], err_msg=name)


def test_an_end_token_stops(generated):
    """Ours keeps the end token, theirs drops it."""
    prompt, end = generated["in/x"][0].tolist(), generated.meta["eos_id"]
    expected = [*generated["out/eos_stopped"][0, len(prompt) :].tolist(), end]
    found = generate(generated.lm, [prompt], max_new_tokens=8, sampler=Sampler(temperature=0.0), stop=end)
    assert found.tokens[0, : found.lengths[0]].tolist() == expected


@pytest.mark.parametrize(("name", "context"), [("generate_simple_past_context", 32), ("generate_simple_ctx5", 5)])
def test_greedy_tokens_of_a_window_that_slides(generated, name, context):
    """Past its context the original forgets the oldest token; we refuse, and get its tokens from the same windows."""
    rows = generated[f"out/{name}"]
    for end in range(generated["in/x"].shape[1], rows.shape[1]):
        logits = next_logits(generated.lm, rows[:, max(0, end - context) : end], context)
        np.testing.assert_array_equal(logits.argmax(-1), rows[:, end])


def test_sampling_distributions(generated):
    """What the original hands to its random draw: top-k and temperature, which give the same in either order."""
    rows = generated["out/sampling_tokens_argmax"]
    sampler = Sampler(temperature=generated.meta["temp"], top_k=generated.meta["top_k"])
    for step, end in enumerate(range(generated["in/x"].shape[1], rows.shape[1])):
        logits = next_logits(generated.lm, rows[:, :end], rows.shape[1])
        found = jax.nn.softmax(sampler.filter(logits))
        expected = generated[f"out/sampling_probs/{step}"]
        assert ((found > 0) == (expected > 0)).all()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_top_k(generated):
    found = Sampler(top_k=generated.meta["topk_k"]).filter(jnp.asarray(generated["in/topk_logits"]))
    keep = generated["out/topk_keep"]
    np.testing.assert_array_equal(np.isfinite(found), keep)
    np.testing.assert_array_equal(np.where(keep, found, 0), np.where(keep, generated["out/topk_values"], 0))
