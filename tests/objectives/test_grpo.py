"""GRPO: the loss by hand, what it refuses, and the objective on models."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.layers.positions import LongRope
from llmq_jax.models import build
from llmq_jax.objectives.grpo import GRPO, OPTIONS, LossOptions, grpo_loss, kl_estimate, loss_weights
from llmq_jax.training.state import create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.models.compiled import apply
from tests.weights import draw_variables


def test_estimates_of_the_kl_divergence():
    """On average over a vocabulary: k1 and k3 are the divergence; the gradients are those that the docstring tells."""
    rng = np.random.default_rng(0)
    logits, reference = jnp.asarray(rng.normal(size=7), jnp.float32), jax.nn.log_softmax(rng.normal(size=7))
    policy = jax.nn.log_softmax(logits)

    def on_average(estimator, logits):
        """Over tokens drawn from the policy as it is: the gradient does not see the drawing."""
        estimate = kl_estimate(jax.nn.log_softmax(logits)[None], reference[None], estimator)[0]
        return (jnp.exp(policy) * estimate).sum()

    def divergence(p, q):
        return (jnp.exp(p) * (p - q)).sum()

    kl = divergence(policy, reference)
    forward = jax.grad(lambda x: divergence(jax.nn.log_softmax(x), reference))(logits)
    backward = jax.grad(lambda x: divergence(reference, jax.nn.log_softmax(x)))(logits)
    grads = {"k1": jnp.zeros(7), "k2": forward, "k3": backward}
    for estimator, grad in grads.items():
        value, gradient = jax.value_and_grad(lambda x, e=estimator: on_average(e, x))(logits)
        np.testing.assert_allclose(gradient, grad, atol=1e-6)
        assert (abs(float(value - kl)) < 1e-6) == (estimator != "k2")
    np.testing.assert_allclose(on_average("k2", logits), (jnp.exp(policy) * (policy - reference) ** 2).sum() / 2)
    assert kl > 0.1


def test_k3_near_the_reference():
    """It is d² / 2 there, of which exp(d) - d - 1 would leave little but the rounding of 1."""
    difference = np.array([1e-3, -1e-3, 4e-4, 0.0], np.float32)
    exact = np.expm1(difference.astype(np.float64)) - difference
    found = kl_estimate(jnp.zeros((1, 4)), jnp.asarray(difference)[None])[0]
    np.testing.assert_allclose(found, exact, rtol=1e-3)


def some_answers(rows=6, length=5, seed=0):
    rng = np.random.default_rng(seed)
    policy = rng.uniform(-3, -0.1, (rows, length))
    arrays = {
        "logprobs": policy,
        "old_logprobs": policy + rng.normal(0, 0.4, policy.shape),
        "reference_logprobs": policy + rng.normal(0, 0.4, policy.shape),
        "advantages": rng.normal(0, 1, rows),
        "mask": np.arange(length) < rng.integers(1, length + 1, rows)[:, None],
        "entropies": rng.uniform(0, 2, policy.shape),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def compiled_loss(*arguments, **options):
    """`grpo_loss`: one program rather than fifty."""
    arrays = {name: options.pop(name) for name in list(options) if isinstance(options[name], jax.Array)}
    return jax.jit(partial(grpo_loss, **options))(*arguments, **arrays)


OF_TYPE = {"dr_grpo": {"max_length": 7}, "gspo": {"clip_low": 0.05}}


@pytest.mark.parametrize("average", ["grpo", "dapo"])
def test_the_loss_by_hand(average):
    """DeepSeekMath's eq. 3, with the bounds and the average of DAPO."""
    answers = some_answers()
    policy, old, reference, advantages, mask, _ = (np.asarray(x, np.float64) for x in answers.values())
    rows = []
    for i in range(len(policy)):
        terms = []
        for t in range(int(mask[i].sum())):
            ratio, odds = np.exp(policy[i, t] - old[i, t]), np.exp(reference[i, t] - policy[i, t])
            gain = min(ratio * advantages[i], min(max(ratio, 0.9), 1.3) * advantages[i])
            terms.append(-(gain - 0.4 * (odds - np.log(odds) - 1)))
        rows.append(terms)
    expected = np.mean([np.mean(row) for row in rows]) if average == "grpo" else np.mean(np.concatenate(rows))
    del answers["entropies"]
    loss, _ = compiled_loss(**answers, loss_type=average, clip_low=0.1, clip_high=0.3, beta=0.4)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_a_reference_without_beta_is_measured_alone():
    answers = some_answers()
    del answers["entropies"]
    loss, metrics = compiled_loss(**answers)
    expected, others = compiled_loss(**{**answers, "reference_logprobs": None})
    difference = answers["reference_logprobs"] - answers["logprobs"]
    distance = (np.expm1(difference) - difference)[answers["mask"] > 0].mean()
    assert float(loss) == float(expected) and float(metrics.pop("kl")) == pytest.approx(float(distance), rel=1e-5)
    assert metrics.keys() == others.keys()


@pytest.mark.parametrize("loss_type", OPTIONS)
def test_micro_batches_add_up(loss_type):
    """Loss, gradient and metrics, those called min and max apart. What is defined on a micro-batch, the average of
    bnpo, does so where all have as many tokens."""
    answers = some_answers()
    if loss_type == "bnpo":
        answers["mask"] = jnp.ones_like(answers["mask"])
    options = {"loss_type": loss_type, "beta": 0.3, **OF_TYPE.get(loss_type, {})}

    @jax.jit
    @jax.value_and_grad
    def whole(policy):
        return grpo_loss(**{**answers, "logprobs": policy}, **options)[0]

    def parts(policy):
        weights, metrics, total = loss_weights(answers["mask"]), [], 0.0
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
            part = {name: array[rows] for name, array in {**answers, "logprobs": policy}.items()}
            value, found = grpo_loss(**part, **options, weights=weights)
            total += value
            metrics.append(found)
        return total, metrics

    loss, gradient = whole(answers["logprobs"])
    (total, found), summed = jax.jit(jax.value_and_grad(parts, has_aux=True))(answers["logprobs"])
    assert float(total) == pytest.approx(float(loss), abs=1e-6)
    np.testing.assert_allclose(summed, gradient, atol=1e-6)
    _, metrics = compiled_loss(**answers, **options)
    for name, value in metrics.items():
        combine = {"min": min, "max": max}.get(name[-3:], sum)
        assert float(combine(part[name] for part in found)) == pytest.approx(float(value), abs=1e-6), name


def test_the_policy_alone_learns():
    """Also from what it gave itself: the old log-probabilities of the first step, a reference that is the policy."""
    answers = some_answers()

    def loss(policy, old, reference):
        others = {"logprobs": policy, "old_logprobs": old, "reference_logprobs": reference}
        return grpo_loss(**{**answers, **others}, beta=0.3)[0]

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*list(answers.values())[:3])
    assert [bool(gradient.any()) for gradient in gradients] == [True, False, False]


def test_what_does_not_count_is_not_read():
    answers = some_answers()
    hole = jnp.where(answers["mask"] > 0, 0.0, jnp.nan)
    assert jnp.isnan(hole).any()

    def loss(policy, hole):
        logprobs = {name: answers[name] + hole for name in ("old_logprobs", "reference_logprobs", "entropies")}
        full = {**answers, **logprobs, "logprobs": policy + hole}
        return grpo_loss(**full, beta=0.2, entropy_coefficient=0.1)

    differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = differentiated(answers["logprobs"], hole)
    (expected, _), grad = differentiated(answers["logprobs"], jnp.zeros_like(hole))
    assert float(value) == float(expected) and all(jnp.isfinite(x) for x in metrics.values())
    np.testing.assert_array_equal(gradient, grad)


@pytest.mark.parametrize("loss_type", OPTIONS)
def test_log_probabilities_in_bfloat16(loss_type):
    """They are what they are in float32, also where a ratio is infinite, behind its bound."""
    answers = some_answers()
    answers["old_logprobs"] = answers["old_logprobs"].at[0, 0].add(-1e4).at[1, 0].add(100.0)
    answers["advantages"] = answers["advantages"].at[0].set(1.0)
    half = {name: array.astype(jnp.bfloat16) if name.endswith("logprobs") else array for name, array in answers.items()}
    options = {"loss_type": loss_type, **OF_TYPE.get(loss_type, {})}
    del half["reference_logprobs"]

    def loss(policy, others):
        others = {**others, "logprobs": policy, "old_logprobs": others["old_logprobs"].astype(policy.dtype)}
        return grpo_loss(**others, reference_logprobs=None, **options)[0]

    differentiated = jax.jit(jax.value_and_grad(loss))
    value, gradient = differentiated(half["logprobs"], half)
    expected, grad = differentiated(half["logprobs"].astype(jnp.float32), half)
    assert float(value) == float(expected) and jnp.isfinite(value)
    np.testing.assert_array_equal(gradient, grad.astype(jnp.bfloat16))
    assert jnp.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0.01


def test_parts_that_are_clipped():
    """Four answers: half clipped below, wholly, one without tokens, and one that clipping would hit if its advantage
    were negative."""
    ratio = jnp.asarray([[0.5, 1.5], [0.5, 0.7], [0.1, 0.1], [0.5, 1.5]])
    mask = jnp.asarray([[1, 1], [1, 1], [0, 0], [1, 1]])
    advantages = jnp.asarray([-1.0, -1.0, -1.0, 1.0])
    arguments = jnp.log(ratio), jnp.zeros((4, 2)), None, advantages, mask
    _, metrics = compiled_loss(*arguments)
    expected = {"low_mean": 3 / 6, "low_min": 0.0, "high_mean": 1 / 6, "high_max": 0.5, "region_mean": 4 / 6}
    assert {name.split("/")[1]: float(value) for name, value in metrics.items()} == pytest.approx(expected)
    # Of the first three the least is half: one without tokens is no extreme.
    _, metrics = compiled_loss(*(x if x is None else x[:3] for x in arguments))
    assert float(metrics["clip_ratio/low_min"]) == 0.5 and float(metrics["clip_ratio/high_max"]) == 0.0
    # In a batch without any token nothing is clipped.
    _, metrics = compiled_loss(*(x if x is None else x[2:3] for x in arguments))
    assert set(map(float, metrics.values())) == {0.0}
    _, metrics = compiled_loss(*arguments, loss_type="cispo", clip_high=1.4)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx({"cispo_clip_ratio": 1 / 6})
    # One ratio an answer, means of logarithms: 0.87, 0.59, 1 and 0.87.
    _, metrics = compiled_loss(*arguments, loss_type="gspo", clip_low=0.4)
    assert float(metrics["clip_ratio/low_mean"]) == pytest.approx(1 / 4)
    # With an advantage for each token it is tokens that count.
    by_token = *arguments[:3], jnp.asarray([[-1, -1], [-1, 1], [-1, -1], [1, 1.0]]), mask
    _, metrics = compiled_loss(*by_token, loss_type="gspo", clip_low=0.4)
    assert float(metrics["clip_ratio/low_mean"]) == pytest.approx(1 / 6)
    assert not any(compiled_loss(*arguments, clip_low=1.0)[1][f"clip_ratio/low_{kind}"] for kind in ("mean", "min"))


def test_defaults_of_the_loss_types():
    """None is the default that is documented; clip_high is as clip_low."""
    answers = some_answers()
    spelled = {
        "sapo": {"sapo_temperature_positive": 1.0, "sapo_temperature_negative": 1.05},
        "cispo": {"clip_high": 5.0},
        "grpo": {"clip_low": 0.2, "clip_high": 0.2, "kl": "k3"},
        "dr_grpo": {"max_length": answers["mask"].shape[1]},
    }
    for loss_type, options in spelled.items():
        found, expected = (
            compiled_loss(**answers, loss_type=loss_type, beta=0.1, **given)[0] for given in ({}, options)
        )
        assert float(found) == float(expected)
    narrow, spelled_out = (
        compiled_loss(**answers, beta=0.1, clip_low=0.05, **given)[0] for given in ({}, {"clip_high": 0.05})
    )
    assert float(narrow) == float(spelled_out)
    assert LossOptions(clip_high=0.0).bounds == (0.8, 1.0)  # 0 is no None


REFUSED = [
    ({"loss_type": "gpro"}, "loss_type='gpro' is unknown; did you mean"),
    (
        {"loss_type": "cispo", "clip_low": 0.2},
        "clip_low=0.2 has no effect with loss_type='cispo', only with grpo, bnpo",
    ),
    ({"loss_type": "sapo", "clip_high": 0.2}, "clip_high=0.2 has no effect with loss_type='sapo'"),
    (
        {"sapo_temperature_positive": 1.0},
        "sapo_temperature_positive=1.0 has no effect with loss_type='grpo', only with",
    ),
    ({"max_length": 10}, "max_length=10 has no effect with loss_type='grpo', only with dr_grpo"),
    ({"loss_type": "dr_grpo", "max_length": 0}, "loss_type='dr_grpo' divides by max_length=0"),
    ({"kl": "k1"}, "kl='k1' has no effect with beta=0"),
    ({"kl": "k4", "beta": 0.1}, "kl='k4' is unknown; choose from k1, k2, k3"),
    ({"beta": -0.1}, "beta=-0.1 must be at least 0"),
    ({"clip_high": float("nan")}, "clip_high=nan must be at least 0, and finite"),
    ({"clip_low": 1.5}, "clip_low=1.5 must be at most 1"),
    ({"entropy_coefficient": float("inf")}, "entropy_coefficient=inf must be finite"),
    ({"loss_type": "sapo", "sapo_temperature_negative": 0.0}, "sapo_temperature_negative=0.0 must be positive"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_are_refused(options, message):
    """By the loss and, before anything runs, by the objective."""
    zeros = jnp.zeros((2, 3))
    reference = zeros if options.get("beta") else None
    for attempt in (
        lambda: grpo_loss(zeros, zeros, reference, jnp.zeros(2), zeros, **options),
        lambda: GRPO(build(DENSE), **options),
    ):
        with pytest.raises(BadInput) as error:
            attempt()
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda x: grpo_loss(x, x, None, x[:, 0], x, beta=0.1), "beta=0.1 needs the log-probabilities of the ref"),
        (lambda x: grpo_loss(x, x, None, x[:, 0], x, entropy_coefficient=0.1), "=0.1 needs the entropies"),
        (lambda x: kl_estimate(x, x, "k0"), "kl='k0' is unknown"),
        (lambda x: GRPO(build(SPARSE), group_size=2), "group_size=2: a model with experts, frozen layers or a RoPE"),
        (lambda x: GRPO(build(SCALED), group_size=2), "a RoPE that goes by the length of a row cannot share"),
        (lambda x: GRPO(build(DENSE).clone(frozen_layers=1), group_size=2), "frozen layers or a RoPE"),
        (lambda x: GRPO(build(DENSE), loss_type="dr_grpo"), "loss_type='dr_grpo' divides by max_length=None"),
        (lambda x: GRPO(build(DENSE), temperature=0.0), "temperature=0.0 of GRPO must be positive"),
    ],
)
def test_what_cannot_be(attempt, message):
    with pytest.raises(BadInput) as error:
        attempt(jnp.zeros((4, 3)))
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The objective

SIZES = {"vocab_size": 31, "max_position_embeddings": 16, "hidden_size": 16, "num_hidden_layers": 2}
DENSE = lq.GPT2Config(
    **SIZES, num_attention_heads=2, initializer_range=0.3, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
)
SPARSE = lq.MixtralConfig(
    **SIZES, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, num_local_experts=4,
    initializer_range=0.3,
)  # fmt: skip

SCALED = lq.Llama3Config(
    **SIZES, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8,
    rope_parameters=LongRope(
        factor=2.0, original_max_position_embeddings=8, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4
    ),
)  # fmt: skip


@cache
def made(config):
    return build(config), draw_variables(config, seed=1)


def a_batch(rows=4, count=5, reference=False):
    """The second answer has lost the token that would end it; its completion is counted without its second token."""
    rng = np.random.default_rng(3)
    prompts, lengths = np.array([2, 4, 3, 1, 2, 3][:rows]), np.array([5, 3, 1, 4, 2, 5][:rows])
    mask = np.arange(count) < lengths[:, None]
    mask[1, 1] = False
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 31, (rows, 10)), jnp.int32),
        "lengths": jnp.asarray(prompts + lengths, jnp.int32),
        "prompt_lengths": jnp.asarray(prompts, jnp.int32),
        "completion_mask": jnp.asarray(mask, jnp.float32),
        "old_logprobs": jnp.asarray(rng.uniform(-4, -2, (rows, count)), jnp.float32),
        "advantages": jnp.asarray(rng.normal(size=rows), jnp.float32),
    }
    if reference:
        batch["reference_logprobs"] = batch["old_logprobs"] + 0.3
    return batch


def scores(model, variables, batch, temperature=1.0):
    """(log-probabilities, entropies) of the completions, token by token, from all logits."""
    logprobs = np.asarray(jax.nn.log_softmax(apply(model, variables, batch["tokens"]) / temperature))
    found = np.zeros((2, *batch["completion_mask"].shape), np.float32)
    for i, row in enumerate(logprobs):
        prompt, length = int(batch["prompt_lengths"][i]), int(batch["lengths"][i])
        for t in range(length - prompt):
            before = row[prompt + t - 1]
            found[:, i, t] = before[int(batch["tokens"][i, prompt + t])], -(np.exp(before) * before).sum()
    return jnp.asarray(found)


def run(objective, variables, batch, rng=None):
    """(loss, metrics) of a batch as floats."""

    @jax.jit
    def compute(variables, batch, rng):
        loss, metrics, _ = objective.loss(variables, batch, objective.weights(batch), rng)
        return loss, metrics

    return jax.tree.map(float, compute(variables, batch, rng))


def test_the_objective_is_the_loss_of_the_model():
    model, variables = made(DENSE)
    batch = a_batch(reference=True)
    objective = GRPO(model, loss_type="dapo", clip_low=0.1, beta=0.2, kl="k2", entropy_coefficient=0.5, temperature=0.7)
    logprobs, entropies = scores(model, variables, batch, 0.7)
    arguments = (
        logprobs, batch["old_logprobs"], batch["reference_logprobs"], batch["advantages"], batch["completion_mask"]
    )  # fmt: skip
    options = {"loss_type": "dapo", "clip_low": 0.1, "beta": 0.2, "kl": "k2", "entropies": entropies}
    expected, metrics = jax.tree.map(float, compiled_loss(*arguments, **options, entropy_coefficient=0.5))
    loss, found = run(objective, variables, batch, jax.random.key(0))
    assert loss == pytest.approx(expected, abs=1e-5) and found == pytest.approx(metrics, abs=1e-5)
    # Evaluation: without the bonus.
    loss, found = run(objective, variables, batch)
    assert loss == pytest.approx(metrics.pop("policy_loss"), abs=1e-5) and found == pytest.approx(metrics, abs=1e-5)
    assert loss > expected + 0.1


def test_a_batch_must_have_what_the_options_need():
    model, variables = made(DENSE)
    with pytest.raises(BadInput, match="log-probabilities of the reference model"):
        run(GRPO(model, beta=0.1), variables, a_batch())
    with pytest.raises(KeyError, match="prompts"):
        run(GRPO(model, group_size=2), variables, a_batch())


def test_accumulation_does_not_change_the_step():
    model, variables = made(DENSE)
    objective, optimizer = GRPO(model, loss_type="dapo"), optax.sgd(1.0)
    results = []
    for parts in (1, 2):
        state = create_state(jax.tree.map(jnp.copy, variables), optimizer)
        state, metrics = make_train_step(objective, optimizer, accumulate=parts)(state, a_batch())
        results.append((state.variables, metrics))
    assert "clip_ratio/low_min" in results[0][1] and "entropy" in results[0][1]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *results)


@pytest.mark.parametrize("loss_type", ["gspo", "dapo"])
def test_evaluation_is_the_mean_over_all_answers(loss_type):
    """However the batches are cut; of gspo the loss is one of answers, the distance from the reference of tokens."""
    model, variables = made(DENSE)
    objective = GRPO(model, loss_type=loss_type, beta=0.3)
    batch, step = a_batch(6, reference=True), make_eval_step(objective)
    whole = evaluate(step, variables, [batch])
    loss, metrics = run(objective, variables, batch)
    assert whole == pytest.approx({"loss": loss, **metrics}, abs=2e-5)
    by_token = batch | {"advantages": jnp.repeat(batch["advantages"][:, None], 5, axis=1)}
    for each in (batch, by_token):  # with an advantage for each token it is tokens that gspo clips
        parts = [{name: x[rows] for name, x in each.items()} for rows in (slice(0, 2), slice(2, 6))]
        assert evaluate(step, variables, parts) == pytest.approx(evaluate(step, variables, [each]), abs=2e-5)


def test_balance_losses_are_added_in_training():
    model, variables = made(SPARSE)
    objective, batch = GRPO(model), a_batch()
    plain, _ = run(objective, variables, batch)
    training, weights = jax.jit(objective.loss), objective.weights(batch)
    total, metrics, _ = training(variables, batch, weights, jax.random.key(0))
    assert float(metrics["policy_loss"]) == pytest.approx(plain, abs=1e-6)
    expected = plain + SPARSE.router_aux_loss_coef * float(metrics["load_balance_loss"])
    assert float(total) == pytest.approx(expected, abs=1e-6) and float(total) > plain
    # Half of a batch adds half of its own.
    doubled = {name: 2 * weight for name, weight in weights.items()}
    _, of_half, _ = training(variables, batch, doubled, jax.random.key(0))
    assert float(of_half["load_balance_loss"]) == pytest.approx(float(metrics["load_balance_loss"]) / 2)


def test_the_first_step_has_a_loss_of_0_and_a_gradient():
    model, variables = made(DENSE)
    batch = a_batch()
    batch |= {"old_logprobs": scores(model, variables, batch)[0], "advantages": jnp.asarray([1.0, -1.0, 1.0, -1.0])}
    objective = GRPO(model)

    @jax.jit
    @jax.value_and_grad
    def compute(variables):
        return objective.loss(variables, batch, objective.weights(batch))[0]

    loss, gradient = compute(variables)
    assert float(loss) == pytest.approx(0.0, abs=1e-5) and float(optax.tree.norm(gradient)) > 0.1
