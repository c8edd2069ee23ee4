"""DPO and its kin: formulas, what is refused, accumulation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.objectives.preference import DPO, dpo_loss, pair_logprobs
from llmq_jax.training.state import create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.weights import draw_variables

POLICY = jnp.asarray([-10.0, -12.0, -3.0]), jnp.asarray([-11.0, -9.0, -3.0])
REFERENCE = jnp.asarray([-10.5, -12.5, -4.0]), jnp.asarray([-10.0, -10.0, -4.0])
DELTA = np.array([1.5, -0.5, 0.0])


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -log_sigmoid(0.1 * DELTA)),
        ({"beta": 2.0}, -log_sigmoid(2 * DELTA)),
        ({"beta": 2.0, "label_smoothing": 0.2}, -0.8 * log_sigmoid(2 * DELTA) - 0.2 * log_sigmoid(-2 * DELTA)),
        (
            {"loss_type": "robust", "label_smoothing": 0.2},
            (-0.8 * log_sigmoid(0.1 * DELTA) + 0.2 * log_sigmoid(-0.1 * DELTA)) / 0.6,
        ),
        ({"loss_type": "hinge", "beta": 1.0}, np.maximum(0, 1 - DELTA)),
        ({"loss_type": "ipo", "beta": 0.5}, (DELTA - 1) ** 2),
    ],
)
def test_losses(options, expected):
    loss, metrics = dpo_loss(*POLICY, *REFERENCE, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    beta = options.get("beta", 0.1)
    np.testing.assert_allclose(metrics["rewards/margins"], beta * DELTA, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics["rewards/chosen"], beta * np.array([0.5, 0.5, 1.0]), rtol=1e-6)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], [1, 0, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be at least 0 and below 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 must be at least 0 and below 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing has no effect with loss_type='hinge'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect with loss_type='ipo'"),
        ({"loss_type": "kto"}, "loss_type='kto' is unknown; choose from sigmoid, robust, hinge, ipo"),
        ({"loss_type": "cdpo"}, "loss_type='cdpo' is unknown; cDPO is sigmoid with label_smoothing"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
    ],
)
def test_what_means_nothing_is_refused(lm, options, message):
    with pytest.raises(BadInput, match=message):
        dpo_loss(*POLICY, *REFERENCE, **options)
    with pytest.raises(BadInput, match=message):
        DPO(lm[0], **options)


def test_ipo_always_compares_means(lm):
    with pytest.raises(BadInput, match="normalise has no effect with loss_type='ipo'"):
        DPO(lm[0], loss_type="ipo", normalise=True)


@pytest.fixture(scope="module")
def lm():
    config = lq.GPT2Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return lq.build(config), draw_variables(config, seed=1)


@partial(jax.jit, static_argnums=0)
def logprobs_of(model, variables, batch):
    return pair_logprobs(model, variables, batch)[0]


def pairs(lm, count=4):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (count, 2, 12)).astype(np.int32)
    lengths = rng.integers(6, 13, (count, 2)).astype(np.int32)
    places = np.arange(12)
    batch = {
        "tokens": tokens,
        "lengths": lengths,
        "response_mask": ((places >= 4) & (places < lengths[..., None])).astype(np.float32),
        "mask": np.ones(count, np.float32),
    }
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    reference = np.asarray(logprobs_of(*lm, batch)) + rng.normal(0, 0.5, (count, 2))
    return batch | {"reference_logprobs": jnp.asarray(reference, jnp.float32)}


def test_answers_are_summed_over_their_tokens(lm):
    model, variables = lm
    batch = pairs(lm)
    found = logprobs_of(model, variables, batch)
    apply = jax.jit(lambda variables, row: jax.nn.log_softmax(model.apply(variables, row)))
    batch = {name: np.asarray(array) for name, array in batch.items()}
    for pair in range(4):
        for answer in range(2):
            row = batch["tokens"][pair, answer][None]
            logprobs = np.asarray(apply(variables, row))[0]
            end = batch["lengths"][pair, answer]
            expected = sum(logprobs[place - 1, row[0, place]] for place in range(4, end))
            np.testing.assert_allclose(found[pair, answer], expected, atol=1e-4)


def test_normalised_is_the_loss_of_means(lm):
    model, variables = lm
    batch = pairs(lm)
    objective = DPO(model, beta=0.5, normalise=True)
    policy = np.asarray(logprobs_of(model, variables, batch))
    tokens = np.asarray(batch["response_mask"]).sum(-1)
    reference = np.asarray(batch["reference_logprobs"])
    means = (jnp.asarray(row) for row in (*(policy / tokens).T, *(reference / tokens).T))
    expected, _ = dpo_loss(*means, beta=0.5)
    loss, metrics, _ = jax.jit(objective.loss)(variables, batch, objective.weights(batch))
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    # Rewards stay sums.
    margins = 0.5 * ((policy - reference) @ np.array([1.0, -1.0]))
    np.testing.assert_allclose(metrics["rewards/margins"], margins.mean(), rtol=1e-4)


def test_balance_losses_are_added_in_training(lm):
    config = lq.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        max_position_embeddings=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        num_local_experts=4,
    )
    objective, batch, variables = DPO(lq.build(config)), pairs(lm), draw_variables(config, seed=1)
    training, weights = jax.jit(objective.loss), objective.weights(batch)
    total, metrics, _ = training(variables, batch, weights, jax.random.key(0))
    added = config.router_aux_loss_coef * metrics["load_balance_loss"]
    np.testing.assert_allclose(total - metrics["preference_loss"], added, atol=1e-6)
    assert added > 1e-3
    # Half of a batch adds half of its own.
    doubled = {name: 2 * weight for name, weight in weights.items()}
    _, of_half, _ = training(variables, batch, doubled, jax.random.key(0))
    np.testing.assert_allclose(of_half["load_balance_loss"], metrics["load_balance_loss"] / 2, rtol=1e-6)


def test_accumulation_and_rows_that_do_not_count_change_nothing(lm):
    model, variables = lm
    batch = pairs(lm)
    objective, optimizer = DPO(model), optax.sgd(0.1)

    def fresh():
        return create_state(jax.tree.map(jnp.copy, variables), optimizer)  # the step consumes it

    whole, metrics = make_train_step(objective, optimizer)(fresh(), batch)
    parts, of_parts = make_train_step(objective, optimizer, accumulate=2)(fresh(), batch)
    for name, value in metrics.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(whole.variables), jax.tree.leaves(parts.variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

    padded = {name: np.concatenate([array, array[:2]]) for name, array in batch.items()}
    for name in ("mask", "response_mask"):  # rows without an answer, of which there is no mean
        padded[name][4:] = 0
    for options in ({"loss_type": "ipo"}, {}):
        eval_step = make_eval_step(DPO(model, **options))
        expected, found = (evaluate(eval_step, variables, [some]) for some in (batch, padded))
        assert found == pytest.approx(expected, rel=1e-5)
    halves = [{name: array[start : start + 2] for name, array in batch.items()} for start in (0, 2)]
    assert evaluate(eval_step, variables, halves) == pytest.approx(expected, rel=1e-5)
