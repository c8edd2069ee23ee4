"""The reward objective against hand-computed values, how tokens' scores become rewards, and that micro-batches add
up."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import build
from llmq_jax.objectives.balance_losses import balance_terms
from llmq_jax.objectives.reward import RewardModel, bradley_terry_loss, model_rewards, sequence_rewards, token_scores
from llmq_jax.training.state import create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.weights import draw_variables

SIZES = {"vocab_size": 31, "max_position_embeddings": 16, "hidden_size": 16, "num_hidden_layers": 2}
LABELS = ("reward",)
DENSE = lq.GPT2Config(
    **SIZES,
    num_attention_heads=2,
    labels=LABELS,
    initializer_range=0.3,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
SPARSE = lq.MixtralConfig(
    **SIZES, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, num_local_experts=4, labels=LABELS,
    initializer_range=0.3,
)  # fmt: skip
PAIRS, REAL, WIDTH = 8, 6, 10


@functools.cache
def made(config):
    return build(config), draw_variables(config, seed=1)


def a_batch(seed=0, margins=True):
    """Six pairs that count, and two that do not."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, WIDTH + 1, (PAIRS, 2)).astype(np.int32)
    starts = rng.integers(1, lengths)
    places = np.arange(WIDTH)
    lengths[REAL:] = 0
    batch = {
        "tokens": rng.integers(0, 31, (PAIRS, 2, WIDTH)).astype(np.int32),
        "lengths": lengths,
        "response_mask": ((places >= starts[..., None]) & (places < lengths[..., None])).astype(np.float32),
        "mask": (np.arange(PAIRS) < REAL).astype(np.float32),
    }
    if margins:
        batch["margins"] = rng.uniform(0, 2, PAIRS).astype(np.float32)
    return {name: jnp.asarray(array) for name, array in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, variables, tokens):
    return model.apply(variables, tokens, method="hidden")


@functools.partial(jax.jit, static_argnums=0)
def loss_of(objective, variables, batch, rng=None):
    """(loss, metrics), weighted by the batch itself."""
    return objective.loss(variables, batch, objective.weights(batch), rng)[:2]


@functools.partial(jax.jit, static_argnums=(0, 5))
def rewards_of(model, variables, tokens, lengths, mask, pooling):
    return model_rewards(model, variables, tokens, lengths, mask, pooling)[0]


def rewards_by_hand(model, variables, batch, pooling):
    """[REAL, 2], of each text alone, without padding."""
    found = np.zeros((REAL, 2))
    for place in np.ndindex(REAL, 2):
        length = int(batch["lengths"][place])
        # What follows a text changes nothing in a causal model: one shape is one compilation.
        hidden = hidden_of(model, variables, batch["tokens"][place][None])[0, :length]
        scores = np.asarray(hidden, np.float64) @ np.asarray(variables["params"]["score"]["kernel"], np.float64)[:, 0]
        response = np.asarray(batch["response_mask"][place][:length]) > 0
        found[place] = scores[-1] if pooling == "last" else scores[response].mean()
    return found


@pytest.fixture(scope="module", params=[DENSE, SPARSE], ids=["dense", "experts"])
def model_and_variables(request):
    return made(request.param)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(("margins", "center"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_loss_and_metrics_by_hand(model_and_variables, pooling, margins, center):
    model, variables = model_and_variables
    batch = a_batch(margins=margins)
    rewards = rewards_by_hand(model, variables, batch, pooling)
    chosen, rejected = rewards.T
    difference = chosen - rejected - (np.asarray(batch["margins"])[:REAL] if margins else 0)
    losses = np.log1p(np.exp(-difference)) + center * (chosen + rejected) ** 2
    objective = RewardModel(model, pooling, center)
    loss, metrics = loss_of(objective, variables, batch)
    assert float(loss) == pytest.approx(losses.mean(), abs=1e-5)
    expected = {
        "accuracy": (chosen > rejected).mean(),
        "margin": (chosen - rejected).mean(),
        "mean_reward": rewards.mean(),
        "min_reward": rewards.min(),
        "max_reward": rewards.max(),
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, abs=1e-5)
    assert 0 < expected["accuracy"] < 1


def test_the_two_poolings_and_margins_differ():
    """What the hand-computed values could not tell apart, they would not test."""
    model, variables = made(DENSE)
    results = [
        float(loss_of(objective, variables, batch)[0])
        for objective in (RewardModel(model), RewardModel(model, "mean"), RewardModel(model, center=0.3))
        for batch in (a_batch(), a_batch(margins=False))
    ]
    assert min(abs(a - b) for i, a in enumerate(results) for b in results[:i]) > 1e-3


def test_bradley_terry_loss():
    chosen, rejected = jnp.array([1.0, -2.0, 90.0, 0.5]), jnp.array([0.0, 3.0, -90.0, 0.5])
    found = bradley_terry_loss(chosen, rejected)
    np.testing.assert_allclose(found, [np.log1p(np.exp(-1)), np.log1p(np.exp(5)), 0, np.log(2)], atol=1e-6)
    margin = jnp.array([1.0, 0.0, 500.0, -1.0])
    found = bradley_terry_loss(chosen, rejected, margin=margin, center=0.1)
    expected = [np.log(2) + 0.1, np.log1p(np.exp(5)) + 0.1, 320.0, np.log1p(np.exp(-1)) + 0.1]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    gradient = jax.grad(lambda r: bradley_terry_loss(r, rejected, margin=margin).sum())(chosen)
    np.testing.assert_allclose(gradient, -1 / (1 + np.exp(chosen - rejected - margin)), atol=1e-6)


def test_equal_rewards_count_one_half():
    model, variables = made(DENSE)
    batch = a_batch()
    same = {name: batch[name].at[0, 1].set(batch[name][0, 0]) for name in ("tokens", "lengths", "response_mask")}
    batch |= {**same, "mask": batch["mask"].at[1:].set(0)}
    _, metrics = loss_of(RewardModel(model), variables, batch)
    assert float(metrics["accuracy"]) == 0.5 and float(metrics["margin"]) == 0
    assert metrics["min_reward"] == metrics["max_reward"]  # those of other pairs, which do not count, are none


def test_sequence_rewards():
    scores = jnp.array([[1.0, 2.0, 4.0, jnp.nan], [1.0, 3.0, 9.0, 27.0], [jnp.nan] * 4])
    lengths, mask = jnp.array([3, 4, 0]), jnp.array([[0, 1, 1, 0], [0.0, 1, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(sequence_rewards(scores, lengths), [4, 27, 0])
    np.testing.assert_array_equal(sequence_rewards(scores, lengths, mask, "mean"), [3, 15, 0])
    np.testing.assert_array_equal(sequence_rewards(scores, lengths, mask > 0, "mean"), [3, 15, 0])
    gradient = jax.grad(lambda scores: sequence_rewards(scores, lengths, mask, "mean").sum())(scores)
    np.testing.assert_array_equal(gradient, [[0, 0.5, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 0]])


def test_scores_of_tokens_and_rewards_of_rows(model_and_variables):
    """The scores of every token, of which "last" takes one without computing the others; padding changes nothing."""
    model, variables = model_and_variables
    batch = a_batch()
    tokens, mask = (batch[name][:REAL].reshape(2 * REAL, WIDTH) for name in ("tokens", "response_mask"))
    lengths = batch["lengths"][:REAL].ravel()
    scores, _ = jax.jit(functools.partial(token_scores, model))(variables, tokens, lengths)
    assert scores.shape == (2 * REAL, WIDTH) and scores.dtype == jnp.float32
    other = jnp.where(jnp.arange(WIDTH) < lengths[:, None], tokens, 7)
    for pooling in ("last", "mean"):
        found = rewards_of(model, variables, tokens, lengths, mask, pooling)
        np.testing.assert_allclose(found, sequence_rewards(scores, lengths, mask, pooling), atol=1e-5)
        np.testing.assert_allclose(found, rewards_by_hand(model, variables, batch, pooling).ravel(), atol=1e-5)
        np.testing.assert_allclose(rewards_of(model, variables, other, lengths, mask, pooling), found, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_row_without_tokens_has_the_reward_0(pooling):
    model, variables = made(DENSE)
    tokens, lengths = a_batch()["tokens"][:, 0], jnp.asarray([0, 3] * (PAIRS // 2))
    mask = (jnp.arange(WIDTH) < lengths[:, None]).astype(jnp.float32)
    found = rewards_of(model, variables, tokens, lengths, mask, pooling)
    assert ((found != 0) == (lengths > 0)).all()


@pytest.mark.parametrize(("pooling", "rows"), [("last", 2 * PAIRS), ("mean", 2 * PAIRS * WIDTH)])
def test_how_many_positions_go_through_the_head(pooling, rows):
    model, variables = made(DENSE)
    text = str(jax.make_jaxpr(lambda v: loss_of(RewardModel(model, pooling), v, a_batch())[0])(variables))
    heads = re.findall(r":f32\[([\d,]+)\] = dot_general", text)
    assert [found for found in heads if found.endswith(",1")] == [f"{rows},1"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_micro_batches_add_up(pooling):
    model, variables = made(DENSE)
    objective, optimizer = RewardModel(model, pooling, 0.1), optax.sgd(1.0)
    results = []
    for parts in (1, 4):
        state = create_state(jax.tree.map(jnp.copy, variables), optimizer)
        state, metrics = make_train_step(objective, optimizer, accumulate=parts)(state, a_batch())
        results.append((state.variables, metrics))
    assert {"accuracy", "margin", "min_reward", "max_reward"} < set(results[0][1])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *results)


def test_evaluation_is_over_all_pairs():
    """However the batches are cut, and with a last one that is not full."""
    model, variables = made(DENSE)
    step = make_eval_step(RewardModel(model, center=0.1))
    whole = evaluate(step, variables, [a_batch()])
    parts = [{name: x[rows] for name, x in a_batch().items()} for rows in (slice(0, 5), slice(5, 8))]
    assert evaluate(step, variables, parts) == pytest.approx(whole, abs=1e-5)
    assert set(whole) == {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"}


def test_balance_losses_are_added_in_training():
    model, variables = made(SPARSE)
    objective, batch = RewardModel(model), a_batch()
    plain, _ = loss_of(objective, variables, batch)
    training, weights = jax.jit(objective.loss), objective.weights(batch)
    total, metrics, _ = training(variables, batch, weights, jax.random.key(0))
    assert float(metrics["reward_loss"]) == pytest.approx(float(plain), abs=1e-6)
    expected = float(plain) + SPARSE.router_aux_loss_coef * float(metrics["load_balance_loss"])
    assert float(total) == pytest.approx(expected, abs=1e-6) and float(total) > float(plain)
    # Of the whole batch: the pairs that count are all of it.
    _, _, counts = jax.jit(objective.loss)(variables, batch, objective.weights(batch))
    _, terms = balance_terms(model.experts, counts, jnp.float32(1.0))
    assert float(metrics["load_balance_loss"]) == pytest.approx(float(terms["load_balance_loss"]), abs=1e-6)
    # Half of a batch adds half of its own.
    doubled = {name: 2 * weight for name, weight in weights.items()}
    _, of_half, _ = training(variables, batch, doubled, jax.random.key(0))
    assert float(of_half["load_balance_loss"]) == pytest.approx(float(terms["load_balance_loss"]) / 2, abs=1e-6)


def test_dropout_acts_in_training():
    _, variables = made(DENSE)
    objective, batch = RewardModel(build(dataclasses.replace(DENSE, resid_pdrop=0.1))), a_batch()
    for rng, acts in ((None, False), (jax.random.key(0), True)):
        program = jax.make_jaxpr(objective.loss)(variables, batch, objective.weights(batch), rng)
        assert ("random_bits" in str(program)) == acts


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_batch_in_which_nothing_counts_is_no_division_by_zero(pooling):
    model, variables = made(DENSE)
    objective = RewardModel(model, pooling)
    batch = {name: jnp.zeros_like(array) for name, array in a_batch().items()}
    loss, gradients = jax.value_and_grad(lambda v: loss_of(objective, v, batch)[0])(variables)
    assert float(loss) == 0.0 and not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (None, {}, "the model's config has no labels; to give rewards it needs one"),
        (("a", "b"), {}, "the model's config has 2 labels (a, b)"),
        (LABELS, {"pooling": "first"}, 'pooling must be "last" or "mean", not \'first\''),
        (LABELS, {"center": -0.1}, "center=-0.1 must not be negative"),
        (LABELS, {"center": float("nan")}, "center=nan must not be negative"),
    ],
)
def test_what_cannot_be(labels, arguments, message):
    with pytest.raises(BadInput) as error:
        RewardModel(build(dataclasses.replace(DENSE, labels=labels)), **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mean_needs_a_mask():
    with pytest.raises(BadInput, match="give response_mask"):
        sequence_rewards(jnp.zeros((1, 2)), jnp.array([2]), pooling="mean")
    with pytest.raises(BadInput, match='must be "last" or "mean"'):
        sequence_rewards(jnp.zeros((1, 2)), jnp.array([2]), pooling="sum")
