"""Golden arrays of the original's DPO: mean log-probabilities, loss, gradients through two models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.interop import config_from_state_dict, from_state_dict, to_state_dict
from llmq_jax.models.decoder import Output
from llmq_jax.objectives.logprobs import token_logprobs
from llmq_jax.objectives.preference import DPO, dpo_loss, pair_logprobs
from tests.parity.golden import read_golden
from tests.parity.gradients import assert_same_gradients


class GivenLogits(lq.GPT2):
    """A model whose hidden states are logits that were given."""

    def forward(self, tokens, positions=None, segment_ids=None, caches=None, *, lengths=None):
        return Output(LOGITS, LOGITS, None, {})

    def unembed(self, hidden):
        return hidden


ARRAYS, _ = read_golden("dpo")
LOGITS = jnp.asarray(ARRAYS["in/logits"])


@pytest.mark.parametrize("case", ["mask", "mask_prompt_unmasked", "nomask"])
def test_log_probabilities_are_means_with_the_originals_denominator(case):
    """It counts the mask before it is shifted: one too many where the first token is in it, which nothing predicts."""
    tokens = jnp.asarray(ARRAYS["in/ids"], jnp.int32)
    model = GivenLogits(lq.GPT2Config(vocab_size=17, hidden_size=16, num_hidden_layers=1, num_attention_heads=1))
    variables = {"params": {"token_embedding": {}}}
    mask = None if case == "nomask" else jnp.asarray(ARRAYS[f"in/{case}"], jnp.float32)
    logprobs = jax.jit(token_logprobs, static_argnums=0)
    sums = logprobs(model, variables, tokens, mask).sum(-1)
    means = sums / (tokens.shape[1] - 1 if mask is None else mask.sum(-1))
    np.testing.assert_allclose(means, ARRAYS[f"out/logprob/{case}"], atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses(beta, smoothing):
    inputs = [
        jnp.asarray(ARRAYS[f"in/{name}"]) for name in ("pol_chosen", "pol_rejected", "ref_chosen", "ref_rejected")
    ]
    loss, metrics = dpo_loss(*inputs, beta=beta, label_smoothing=smoothing)
    expected = f"out/b{beta}_ls{smoothing}"
    np.testing.assert_allclose(loss.mean(), ARRAYS[f"{expected}/loss"], rtol=1e-6)
    for name in ("chosen", "rejected"):  # the original's rewards lack beta
        np.testing.assert_allclose(
            metrics[f"rewards/{name}"].mean() / beta, ARRAYS[f"{expected}/{name}_reward"], rtol=1e-5
        )


def test_loss_and_gradients_of_two_models():
    arrays, meta = read_golden("dpo_models")
    state = under(arrays, "param/")
    states = (
        {name: array for name, array in state.items() if not name.startswith("reference/")},
        under(arrays, "param/reference/"),
    )
    config = config_from_state_dict(states[0], "original", num_attention_heads=meta["cfg"]["n_heads"])
    model = lq.build(config)
    policy, reference = (from_state_dict(state, config, "original") for state in states)

    def paired(name):
        return np.stack([arrays[f"in/chosen{name}"], arrays[f"in/rejected{name}"]], axis=1)

    tokens = jnp.asarray(paired(""), jnp.int32)
    batch = {
        "tokens": tokens,
        "lengths": jnp.full(tokens.shape[:2], tokens.shape[2], jnp.int32),  # the original hides no padding
        "response_mask": jnp.asarray(paired("_mask"), jnp.float32),
        "mask": jnp.ones(len(tokens)),
    }
    batch["reference_logprobs"], _ = jax.jit(pair_logprobs, static_argnums=0)(model, reference, batch)
    objective = DPO(model, beta=meta["beta"], label_smoothing=meta["label_smoothing"], normalise=True)

    def loss(params):
        return objective.loss({"params": params}, batch, objective.weights(batch))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(policy["params"])
    np.testing.assert_allclose(value, arrays["out/loss"], rtol=1e-6)
    # What is added to all keys moves no attention: the gradient of that bias is zero but for rounding.
    expected = {name: array for name, array in under(arrays, "grad/").items() if not name.endswith("w_keys.bias")}
    gradients = to_state_dict({"params": gradients}, config, "original")
    assert_same_gradients({name: gradients[name] for name in expected}, expected)


def under(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
