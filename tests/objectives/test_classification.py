"""The classification objective against hand-computed values, and that micro-batches add up to the batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import build
from llmq_jax.objectives.classification import Classification
from llmq_jax.training.state import create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.weights import draw_variables

SIZES = {"vocab_size": 31, "max_position_embeddings": 16, "hidden_size": 16, "num_hidden_layers": 2}
LABELS = ("a", "b", "c")
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
WEIGHTS = (0.5, 3.0, 0.0)


def a_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "tokens": jnp.asarray(rng.integers(0, 31, (rows, 10)), jnp.int32),
        "lengths": jnp.asarray(rng.integers(1, 11, rows), jnp.int32),
        "labels": jnp.asarray(rng.integers(0, 3, rows), jnp.int32),
        "mask": jnp.asarray([1.0] * (rows - 2) + [0.0] * 2),
    }


@functools.cache
def made(config):
    return build(config), draw_variables(config, seed=1)


@pytest.fixture(params=[DENSE, SPARSE], ids=["dense", "experts"])
def model_and_variables(request):
    return made(request.param)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, variables, tokens):
    return model.apply(variables, tokens)


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_loss_and_accuracy_by_hand(model_and_variables, class_weights):
    model, variables = model_and_variables
    batch = a_batch()
    total = counted = right = 0.0
    for i in range(6):
        length, label = int(batch["lengths"][i]), int(batch["labels"][i])
        logits = np.asarray(logits_of(model, variables, np.asarray(batch["tokens"])[i : i + 1, :length])[0], np.float64)
        weight = 1.0 if class_weights is None else class_weights[label]
        total += weight * (np.log(np.exp(logits).sum()) - logits[label])
        counted += weight
        right += logits.argmax() == label
    objective = Classification(model, class_weights)
    loss, metrics, _ = jax.jit(objective.loss)(variables, batch, objective.weights(batch))
    assert float(loss) == pytest.approx(total / counted, abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(right / 6)


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_micro_batches_add_up(class_weights):
    model, variables = made(DENSE)
    objective, optimizer = Classification(model, class_weights), optax.sgd(1.0)
    results = []
    for parts in (1, 4):
        state = create_state(jax.tree.map(jnp.copy, variables), optimizer)
        state, metrics = make_train_step(objective, optimizer, accumulate=parts)(state, a_batch())
        results.append((state.variables, {name: metrics[name] for name in ("loss", "accuracy", "grad_norm")}))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *results)


def test_evaluation_is_the_mean_over_all_texts():
    """However the batches are cut, and with a last one that is not full."""
    model, variables = made(DENSE)
    objective = Classification(model, WEIGHTS)
    whole = evaluate(make_eval_step(objective), variables, [a_batch()])
    parts = [{name: x[rows] for name, x in a_batch().items()} for rows in (slice(0, 5), slice(5, 8))]
    found = evaluate(make_eval_step(objective), variables, parts)
    assert found == pytest.approx(whole, abs=1e-6) and set(found) == {"loss", "accuracy"}


def test_balance_losses_are_added_in_training():
    model, variables = made(SPARSE)
    objective, batch = Classification(model), a_batch()
    plain, _, _ = jax.jit(objective.loss)(variables, batch, objective.weights(batch))
    training, weights = jax.jit(objective.loss), objective.weights(batch)
    total, metrics, _ = training(variables, batch, weights, jax.random.key(0))
    assert float(metrics["classification_loss"]) == pytest.approx(float(plain), abs=1e-6)
    expected = float(plain) + SPARSE.router_aux_loss_coef * float(metrics["load_balance_loss"])
    assert float(total) == pytest.approx(expected, abs=1e-6) and float(total) > float(plain)
    # Half of a batch adds half of its own.
    doubled = {name: 2 * weight for name, weight in weights.items()}
    _, of_half, _ = training(variables, batch, doubled, jax.random.key(0))
    assert float(of_half["load_balance_loss"]) == pytest.approx(float(metrics["load_balance_loss"]) / 2)
    # Whatever the classes weigh, a batch is a whole one.
    weighed = Classification(model, WEIGHTS)
    _, of_weighed, _ = jax.jit(weighed.loss)(variables, batch, weighed.weights(batch), jax.random.key(0))
    assert float(of_weighed["load_balance_loss"]) == pytest.approx(float(metrics["load_balance_loss"]))


def test_dropout_acts_in_training():
    _, variables = made(DENSE)
    objective, batch = Classification(build(dataclasses.replace(DENSE, resid_pdrop=0.1))), a_batch()
    for rng, acts in ((None, False), (jax.random.key(0), True)):
        program = jax.make_jaxpr(objective.loss)(variables, batch, objective.weights(batch), rng)
        assert ("random_bits" in str(program)) == acts


def test_a_batch_in_which_nothing_counts_is_no_division_by_zero():
    model, variables = made(DENSE)
    objective = Classification(model)
    batch = a_batch() | {"mask": jnp.zeros(8), "lengths": jnp.zeros(8, jnp.int32)}
    loss, _, _ = jax.jit(objective.loss)(variables, batch, objective.weights(batch))
    assert float(loss) == 0.0


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        (None, None, "the model's config has no labels"),
        (("reward",), None, "the model's config has one label (reward)"),
        (LABELS, (1.0, 2.0), "2 class weights given for 3 classes (a, b, c)"),
        (("a", "b"), (1.0,), "1 class weight given for 2 classes (a, b)"),
        (LABELS, (1.0, -2.0, 1.0), "must not be negative"),
        (LABELS, (0.0, 0.0, 0.0), "one of them must be positive"),
    ],
)
def test_what_cannot_be(labels, weights, message):
    import dataclasses

    with pytest.raises(BadInput) as error:
        Classification(build(dataclasses.replace(DENSE, labels=labels)), weights)
    assert message in str(error.value) and "\n" not in str(error.value)
