"""The loss of multi-token prediction, and its part in the training step."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmq_jax.data import multi_token_rows
from llmq_jax.errors import BadInput
from llmq_jax.layers.expert_balance import Balance, all_layers, balance_losses, moved_bias
from llmq_jax.models import build, override, preset
from llmq_jax.models.deepseek3 import DeepSeekV3Config
from llmq_jax.objectives import MultiToken, NextToken
from llmq_jax.training.state import create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.weights import draw_variables

# The bias moves; a balance loss, which accumulation would change, there is none.
BALANCE = Balance(bias_rate=0.01)
CONFIG = DeepSeekV3Config(
    vocab_size=23,
    max_position_embeddings=16,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=6,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    intermediate_size=12,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    n_group=2,
    topk_group=2,
    num_nextn_predict_layers=2,
    initializer_range=0.3,
    balance=BALANCE,
)
MODEL = build(CONFIG)
DEPTH, COEFFICIENTS = 2, (0.4, 0.1)
OBJECTIVE = MultiToken(MODEL, lambda step: jnp.where(step < 1, *COEFFICIENTS))
TERMS = ("loss", "mtp_1_loss", "mtp_2_loss")
SGD = optax.sgd(0.1)


@cache
def variables():
    drawn = draw_variables(CONFIG, seed=3)
    return {**drawn, "router": jax.tree.map(jnp.zeros_like, drawn["router"])}  # as they begin: a step's part is read


def fresh_state(optimizer=SGD):
    """A copy, which the step consumes."""
    return create_state(jax.tree.map(jnp.array, variables()), optimizer)


def packed():
    """Rows of two documents and padding. No document's last token has a target, nor have some others."""
    rows, length, rng = 4, 12, np.random.default_rng(0)
    tokens = rng.integers(0, 23, (rows, length + 1)).astype(np.int32)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row, (first, second) in enumerate([(7, 5), (2, 9), (1, 1), (4, 6)]):
        segments[row, :first], segments[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
    ends = np.append(segments[:, 1:] != segments[:, :-1], np.ones((rows, 1), bool), axis=1)
    mask = (segments != 0) & ~ends & (rng.random((rows, length)) < 0.8)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": mask.astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
    }


def plain():
    """Rows that are one document each."""
    return {name: packed()[name][:3, :9] for name in ("tokens", "targets", "mask")}


def weights_of(batch, step=None):
    return OBJECTIVE.weights({name: jnp.asarray(array) for name, array in batch.items()}, step)


@jax.jit
def compute(variables, batch, weights):
    return OBJECTIVE.loss(variables, batch, weights, jax.random.key(0))[:2]


@jax.jit
def all_logits(tokens, positions, segment_ids):
    inputs = (variables(), tokens, positions, segment_ids)
    return MODEL.apply(*inputs), *MODEL.apply(*inputs, method="mtp_logits")


def by_hand(*batches):
    """{term: mean over what counts}, from the logits, place by place."""
    found = {name: [] for name in TERMS}
    for batch in batches:
        documents = batch.get("segment_ids", np.ones_like(batch["tokens"]))
        logits = all_logits(*(batch.get(name) for name in ("tokens", "positions", "segment_ids")))
        for k, name in enumerate(TERMS):
            log_probabilities = np.asarray(jax.nn.log_softmax(logits[k]))
            rows, places = batch["tokens"].shape
            for row in range(rows):
                for i in range(places - k):
                    together = documents[row, i] != 0 and documents[row, i] == documents[row, i + k]
                    if together and batch["mask"][row, i + k]:
                        found[name].append(-log_probabilities[row, i, batch["targets"][row, i + k]])
    return {name: np.mean(losses) for name, losses in found.items() if losses}


@pytest.mark.parametrize("batch", [packed(), plain()], ids=["packed", "plain"])
def test_the_loss_is_the_main_one_and_a_share_of_each_module_s(batch):
    """Tails of rows and of documents count nowhere."""
    weights = weights_of(batch, 0)
    loss, metrics = compute(variables(), batch, weights)
    expected = by_hand(batch)
    np.testing.assert_allclose(metrics["next_token_loss"], expected["loss"], rtol=1e-5)
    for name in TERMS[1:]:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    total = expected["loss"] + COEFFICIENTS[0] / DEPTH * (expected["mtp_1_loss"] + expected["mtp_2_loss"])
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    # What is said in place of masked targets is all the same.
    other = {**batch, "targets": np.where(batch["mask"] > 0, batch["targets"], 7).astype(np.int32)}
    np.testing.assert_array_equal(compute(variables(), other, weights)[0], loss)


def test_what_counts():
    batch = {"tokens": np.zeros((1, 5), np.int32), "targets": np.arange(5)[None], "mask": np.ones((1, 5))}
    counts = weights_of(batch)
    assert {name: float(counts[name]) for name in TERMS} == {"loss": 5, "mtp_1_loss": 4, "mtp_2_loss": 3}
    batch["segment_ids"] = np.array([[1, 1, 1, 2, 0]])
    batch["mask"] = np.array([[1, 1, 0, 1, 0]])
    counts = weights_of(batch)
    # The first document's last token is a module's to see and has no target; the second has one token.
    assert {name: float(counts[name]) for name in TERMS} == {"loss": 3, "mtp_1_loss": 1, "mtp_2_loss": 0}
    targets, mask = OBJECTIVE.targets({name: jnp.asarray(array) for name, array in batch.items()})["mtp_1_loss"]
    assert mask.tolist() == [[1, 0, 0, 0, 0]] and targets[0, 0] == 1


def test_a_term_without_a_target_is_zero():
    batch = packed()
    batch["mask"] = batch["mask"] * (batch["segment_ids"] == 1) * (batch["positions"] == 0)
    loss, metrics = compute(variables(), batch, weights_of(batch, 0))
    assert metrics["mtp_1_loss"] == metrics["mtp_2_loss"] == 0
    np.testing.assert_allclose(loss, by_hand(batch)["loss"], rtol=1e-5)


def test_every_parameter_of_every_module_learns():
    """The last module's block too, of which the original repository's gets no gradient."""
    batch = packed()
    weights = weights_of(batch, 0)
    gradients = jax.grad(lambda v: compute(v, batch, weights)[0])(variables())
    flat, _ = jax.tree_util.tree_flatten_with_path(gradients["params"]["mtp"])
    assert len(flat) == 19
    for path, gradient in flat:
        name = jax.tree_util.keystr(path)
        for depth in range(DEPTH):
            assert np.isfinite(gradient[depth]).all() and np.abs(gradient[depth]).max() > 0, (name, depth)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["router"]))


# In the training step.


def two_steps(accumulate=1):
    """(state after one step, metrics of the first, metrics of the second)."""
    step = make_train_step(OBJECTIVE, SGD, accumulate=accumulate)
    state, first = step(fresh_state(), packed())
    _, second = step(jax.tree.map(jnp.array, state), packed())
    return state, first, second


@pytest.fixture(scope="module")
def trained():
    return two_steps()


@pytest.mark.exhaustive
def test_accumulation_changes_nothing(trained):
    (state, *metrics), (expected, *expected_metrics) = two_steps(accumulate=2), trained
    for found, wanted in zip(metrics, expected_metrics, strict=True):
        for name in ("loss", "next_token_loss", "mtp_1_loss", "mtp_2_loss", "grad_norm"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)
        np.testing.assert_array_equal(found["expert_load"], wanted["expert_load"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.variables, expected.variables)


def test_the_load_of_modules_is_counted_and_their_bias_moves(trained):
    """A module has the tokens that see another one ahead."""
    state, metrics, _ = trained
    batch = packed()
    segments = batch["segment_ids"]
    real = [(segments != 0).sum()] + [
        ((segments != 0)[:, k:] & (segments[:, k:] == segments[:, :-k])).sum() for k in (1, 2)
    ]
    assert metrics["expert_load"].shape == (1 + DEPTH, 4)
    assert metrics["expert_load"].sum(1).tolist() == [2 * count for count in real]
    found = [state.variables["router"][group]["block_0"]["moe"]["bias"] for group in ("group_1", "mtp")]
    np.testing.assert_allclose(
        np.concatenate(found), moved_bias(jnp.zeros((3, 4)), metrics["expert_load"], BALANCE), atol=1e-7
    )
    assert all(np.abs(row).max() == pytest.approx(0.01) for row in found[1])


def test_the_coefficient_may_be_a_schedule(trained):
    for coefficient, metrics in zip(COEFFICIENTS, trained[1:], strict=True):
        added = coefficient / DEPTH * (metrics["mtp_1_loss"] + metrics["mtp_2_loss"])
        np.testing.assert_allclose(metrics["loss"], metrics["next_token_loss"] + added, rtol=1e-6)
    fixed = MultiToken(MODEL, 0.3).weights({name: jnp.asarray(array) for name, array in packed().items()}, 5)
    assert fixed["coefficient"] == jnp.float32(0.3)


def test_balance_losses_are_of_the_modules_too():
    balance = Balance(sequence=0.2)
    objective = MultiToken(build(override(CONFIG, balance=balance)))
    weights = {**weights_of(packed(), 0), "coefficient": jnp.float32(0.0)}
    training = jax.jit(objective.loss)
    loss, metrics, counts = training(variables(), packed(), weights, jax.random.key(0))
    np.testing.assert_allclose(loss - metrics["next_token_loss"], 0.2 * metrics["sequence_loss"], rtol=1e-4)
    assert counts.keys() == {"group_0", "group_1", "mtp"}
    reports = all_layers(counts)
    np.testing.assert_allclose(metrics["sequence_loss"], balance_losses(reports, balance, 2)["sequence"], rtol=1e-5)
    assert reports.assigned.shape == (1 + DEPTH, 4)
    # Half of a batch adds half of its own.
    halving = {name: 2 * weight for name, weight in weights.items()} | {"coefficient": jnp.float32(0.5)}
    _, of_half, _ = training(variables(), packed(), halving, jax.random.key(0))
    np.testing.assert_allclose(of_half["sequence_loss"], metrics["sequence_loss"] / 2, rtol=1e-5)
    np.testing.assert_allclose(of_half["mtp_coefficient"], 0.25, rtol=1e-6)


def test_next_token_prediction_trains_a_model_that_has_modules():
    """These stay as they are, their bias among them."""
    state, metrics = make_train_step(NextToken(MODEL), SGD)(fresh_state(), packed())
    assert metrics["expert_load"].shape == (1, 4)
    jax.tree.map(np.testing.assert_array_equal, state.variables["params"]["mtp"], variables()["params"]["mtp"])
    jax.tree.map(np.testing.assert_array_equal, state.variables["router"]["mtp"], variables()["router"]["mtp"])
    assert np.any(jax.tree.leaves(state.variables["router"]["group_1"])[0])


def test_evaluation_is_of_the_main_loss_with_the_modules_beside_it():
    batch, held = packed(), fresh_state().variables
    other = {**batch, "mask": batch["mask"] * (np.arange(12) > 3)}
    found = evaluate(make_eval_step(OBJECTIVE), held, [batch, other])
    expected = by_hand(batch, other)
    assert found.keys() == set(TERMS)
    for name in TERMS:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["loss"] == pytest.approx(evaluate(make_eval_step(NextToken(MODEL)), held, [batch, other])["loss"])
    jax.tree.map(np.testing.assert_array_equal, held, variables())


# Rows that say themselves what each module sees.


DOCUMENTS = [[4, 7, 2, 9, 11, 3], [5, 8, 1], [6, 2, 12, 13, 7], [1, 2]]


def test_given_streams_equal_those_of_the_row():
    """Every stream ends with its document's end; a row whose last target is the end says the same."""
    batch = multi_token_rows(DOCUMENTS, DEPTH, end_id=0)
    alike = {name: array for name, array in batch.items() if not name.startswith("ahead")}
    found, expected = (compute(variables(), b, weights_of(b, 0)) for b in (batch, alike))
    assert weights_of(batch)["mtp_2_loss"] == 4 + 1 + 3
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found[1], expected[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("shrink", [False, True])
def test_given_streams_train(shrink):
    batch = multi_token_rows(DOCUMENTS, DEPTH, end_id=0, shrink=shrink)
    adam = optax.adam(0.01)
    step, state = make_train_step(OBJECTIVE, adam), fresh_state(adam)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append([float(metrics[name]) for name in ("next_token_loss", *TERMS[1:])])
    assert np.isfinite(losses).all()
    assert (np.array(losses[-1]) < 0.8 * np.array(losses[0])).all()
    if shrink:  # all streams are as long
        assert metrics["expert_load"].sum(1).tolist() == [2 * (4 + 1 + 3)] * 3


def test_what_does_not_count_is_seen_all_the_same():
    """A mask of the loss hides no token from the modules, as it hides none from the model."""
    batch = multi_token_rows(DOCUMENTS, DEPTH, end_id=0)
    part = {**batch, "ahead_mask": batch["ahead_mask"].copy()}
    part["ahead_mask"][:, :, 0] = 0
    whole, rest = (compute(variables(), b, weights_of(b, 0)) for b in (batch, part))
    only = {**batch, "ahead_mask": batch["ahead_mask"] - part["ahead_mask"]}
    first = compute(variables(), only, weights_of(only, 0))

    def totals(values, b):
        counts = weights_of(b)
        return [float(values[1][name] * counts[name]) for name in TERMS[1:]]

    parts = [totals(*pair) for pair in ((rest, part), (first, only))]
    np.testing.assert_allclose(np.sum(parts, axis=0), totals(whole, batch), rtol=1e-5)


def test_bad_input():
    two = multi_token_rows(DOCUMENTS, DEPTH - 1, end_id=0)
    with pytest.raises(BadInput, match="targets for 1 modules of multi-token prediction, not 2"):
        weights_of(two)
    with pytest.raises(BadInput, match=r"coefficient=-1\.0 of multi-token prediction must be at least 0"):
        MultiToken(MODEL, -1.0)
    with pytest.raises(BadInput, match="needs a model with num_nextn_predict_layers of at least 1"):
        MultiToken(build(override(CONFIG, num_nextn_predict_layers=0)))
    with pytest.raises(BadInput, match="needs a model with num_nextn_predict_layers of at least 1"):
        MultiToken(build(preset("llama-10m")))
    short = {name: array[:, :2] for name, array in plain().items()}
    with pytest.raises(BadInput, match="rows of 2 tokens leave nothing to predict for 2 modules; take longer ones"):
        weights_of(short)
    with pytest.raises(BadInput, match="rows of 2 tokens leave nothing to predict"):
        make_train_step(OBJECTIVE, SGD)(fresh_state(), short)
    with pytest.raises(BadInput, match="cannot be cut into 3 equal micro-batches"):
        make_train_step(OBJECTIVE, SGD, accumulate=3)(fresh_state(), packed())
