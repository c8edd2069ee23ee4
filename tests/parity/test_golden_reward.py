"""The original repository's reward model: its loss, its rewards and one step's gradients. It takes the mean over the
response of what a head with a bias says on every token, which shifts all rewards and no loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.interop import config_from_state_dict, from_state_dict, to_state_dict
from llmq_jax.models import build
from llmq_jax.objectives.reward import RewardModel, bradley_terry_loss, sequence_rewards, token_scores
from tests.parity.golden import LOGITS, read_golden


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_bradley_terry_loss(beta):
    """Theirs multiplies the rewards by β; ours is given them multiplied."""
    arrays, _ = read_golden("bt_loss")

    def loss(chosen, rejected):
        return bradley_terry_loss(beta * chosen, beta * rejected).mean()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(
        jnp.asarray(arrays["in/chosen"]), jnp.asarray(arrays["in/rejected"])
    )
    np.testing.assert_allclose(value, arrays[f"out/b{beta}/loss"], rtol=1e-6)
    for name, gradient in zip(("chosen", "rejected"), gradients, strict=True):
        np.testing.assert_allclose(gradient, arrays[f"grad/b{beta}/{name}"], atol=1e-7)


class Fixture:
    """The arrays, and our model with their weights."""

    def __init__(self):
        self.arrays, self.meta = read_golden("reward_model")
        state = {name[6:]: array for name, array in self.arrays.items() if name.startswith("param/")}
        head, self.bias = state.pop("out.weight"), float(state.pop("out.bias")[0])
        # Their layout knows language models alone: the embedding stands in for a head.
        state["out.weight"] = state["emb_dict.weight"]
        config = config_from_state_dict(state, "original", num_attention_heads=self.meta["cfg"]["n_heads"])
        params = from_state_dict(state, config, "original")["params"]
        assert config.tie_word_embeddings
        self.language_config = config
        self.config = dataclasses.replace(config, labels=("reward",), embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        self.variables = {"params": {**params, "score": {"kernel": jnp.asarray(head.T)}}}
        self.model = build(self.config)

    def batch(self):
        """Ours: the lengths of the texts are those of `meta`, as their collator got them."""
        sides = ("chosen", "rejected")
        lengths = [[len(item[side]) for side in sides] for item in self.meta["items"]]
        masks = np.stack([self.arrays[f"in/{side}_mask"] for side in sides], axis=1).astype(np.float32)
        tokens = np.stack([self.arrays[f"in/{side}"] for side in sides], axis=1)
        batch = {"tokens": tokens.astype(np.int32), "lengths": np.array(lengths, np.int32), "response_mask": masks}
        return {name: jnp.asarray(array) for name, array in {**batch, "mask": np.ones(len(tokens))}.items()}


@pytest.fixture(scope="module")
def fixture():
    return Fixture()


def test_rewards_of_tokens_and_of_texts(fixture):
    batch = fixture.batch()
    score = jax.jit(lambda tokens, lengths: token_scores(fixture.model, fixture.variables, tokens, lengths)[0])
    for place, side in enumerate(("chosen", "rejected")):
        lengths, mask = batch["lengths"][:, place], batch["response_mask"][:, place]
        scores = score(batch["tokens"][:, place], lengths)
        real = np.arange(scores.shape[1]) < np.asarray(lengths)[:, None]
        expected = fixture.arrays[f"out/mini_rewards_{side}"]
        np.testing.assert_allclose((scores + fixture.bias)[real], expected[real], atol=LOGITS)
        found = sequence_rewards(scores, lengths, mask, "mean") + fixture.bias
        np.testing.assert_allclose(found, fixture.arrays[f"out/reward_{side}"], atol=LOGITS)


def test_loss_accuracy_and_gradients(fixture):
    batch, objective = fixture.batch(), RewardModel(fixture.model, "mean")

    @jax.jit
    def compute(variables):
        def loss(variables):
            value, metrics, _ = objective.loss(variables, batch, objective.weights(batch))
            return value, metrics

        return jax.value_and_grad(loss, has_aux=True)(variables)

    (loss, metrics), gradients = compute(fixture.variables)
    assert float(loss) == pytest.approx(float(fixture.arrays["out/loss"]), abs=LOGITS)
    assert float(loss) == pytest.approx(float(fixture.arrays["out/val_loss"]), abs=LOGITS)
    assert float(metrics["accuracy"]) == fixture.arrays["out/val_acc"] == 0.5
    params = dict(gradients["params"])
    found = {"out.weight": np.asarray(params.pop("score")["kernel"]).T}
    # The layout of the language model names the rest.
    found = to_state_dict({"params": params}, fixture.language_config, "original") | found
    expected = {name[5:]: array for name, array in fixture.arrays.items() if name.startswith("grad/")}
    expected.pop("out.bias")
    assert set(expected) <= set(found)
    zeros = set()
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        if scale < 1e-6:
            zeros.add(name)
            assert np.abs(found[name]).max() < 1e-6
        else:
            np.testing.assert_allclose(found[name], gradient, atol=1e-3 * scale, err_msg=name)
    # What shifts all rewards, or all scores of a query, changes nothing.
    assert zeros == {"final_ln.shift", *(f"trf_blocks.{layer}.att.w_keys.bias" for layer in (0, 1))}
