"""GRPO's loss, gradients and metrics against TRL's GRPOTrainer, and its advantages: the trainer's own code is given our
log-probabilities in place of a model's."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmq_jax.objectives.advantages import group_advantages
from llmq_jax.objectives.grpo import OPTIONS, TOKEN_AVERAGES, grpo_loss, loss_weights

pytest.importorskip("trl")
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

ROWS, LENGTH, MAX_LENGTH = 8, 6, 9
CLIPS = {
    "sapo": {"sapo_temperature_positive": 0.8, "sapo_temperature_negative": 1.3},
    "cispo": {"clip_high": 1.1},
    "gspo": {"clip_low": 0.1, "clip_high": 0.15},
    "dr_grpo": {"clip_low": 0.2, "max_length": MAX_LENGTH},
}


def some_answers(advantages_of="answers", seed=1):
    """Ratios inside and outside of the bounds, advantages of both signs, answers of different lengths, one of none."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    logprobs = rng.uniform(-3, -0.1, shape)
    lengths = np.array([6, 2, 5, 1, 3, 0, 4, 6])
    arrays = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + rng.normal(0, 0.4, shape),
        "reference_logprobs": logprobs + rng.normal(0, 0.5, shape),
        "entropies": rng.uniform(0.1, 2, shape),
        "advantages": rng.normal(0, 1, ROWS if advantages_of == "answers" else shape),
        "mask": np.arange(LENGTH) < lengths[:, None],
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def theirs(
    arrays, parts, loss_type, beta=0.0, entropy_coefficient=0.0, items=None, steps_per_generation=None, by_ratio=False
):
    """(loss, gradients, metrics) that TRL accumulates over micro-batches; metrics are means over these."""
    clips = {"clip_low": 0.2} | CLIPS.get(loss_type, {})
    low = clips["clip_low"]
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    shape = arrays["mask"].shape
    for name in ("logprobs", "entropies"):
        tensors[name].requires_grad_()
    trainer = SimpleNamespace(
        loss_type="grpo" if loss_type == "gspo" else loss_type,
        importance_sampling_level="sequence" if loss_type == "gspo" else "token",
        epsilon_low=low,
        epsilon_high=clips.get("clip_high", low),
        beta=beta,
        max_completion_length=MAX_LENGTH,
        entropy_coef=entropy_coefficient,
        _entropy_bonus_enabled=entropy_coefficient != 0,
        args=SimpleNamespace(
            delta=None,
            use_bias_correction_kl=by_ratio,
            sapo_temperature_pos=clips.get("sapo_temperature_positive"),
            sapo_temperature_neg=clips.get("sapo_temperature_negative"),
            steps_per_generation=steps_per_generation or parts,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=False
        ),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=parts,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _metrics={"train": defaultdict(list)},
    )
    total = 0.0
    for rows in np.split(np.arange(shape[0]), parts):
        part = {name: tensor[rows] for name, tensor in tensors.items()}
        trainer._get_per_token_logps_and_entropies = lambda *a, part=part, **k: (
            part["logprobs"],
            part["entropies"],
            None,
        )
        inputs = {
            "prompt_ids": torch.zeros(len(rows), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(rows), 1, dtype=torch.long),
            "completion_ids": torch.zeros(len(rows), shape[1], dtype=torch.long),
            "completion_mask": part["mask"].long(),
            "old_per_token_logps": part["old_logprobs"],
            "advantages": part["advantages"],
            "num_items_in_batch": tensors["mask"].sum() if items is None else torch.tensor(items),
        }
        if beta:
            inputs["ref_per_token_logps"] = part["reference_logprobs"]
        total = total + GRPOTrainer._compute_loss(trainer, None, inputs)
    total.backward()
    gradients = [tensors[name].grad for name in ("logprobs", "entropies")]
    gradients = [np.zeros(shape) if gradient is None else gradient.numpy() for gradient in gradients]
    return total.item(), gradients, trainer._metrics["train"]


def ours(arrays, parts, loss_type, beta=0.0, entropy_coefficient=0.0, tokens=None, by_ratio=False):
    """The same, as sums over micro-batches."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    weights = loss_weights(arrays["mask"])
    if tokens is not None:
        weights["tokens"] = jnp.asarray(tokens)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compute(logprobs, entropies, part):
        return grpo_loss(
            logprobs,
            part["old_logprobs"],
            part["reference_logprobs"] if beta else None,
            part["advantages"],
            part["mask"],
            loss_type=loss_type,
            beta=beta,
            kl_by_ratio=by_ratio,
            entropies=entropies,
            entropy_coefficient=entropy_coefficient,
            weights=weights if parts > 1 or tokens is not None else None,
            **CLIPS.get(loss_type, {}),
        )

    total, gradients, metrics = 0.0, ([], []), []
    for rows in np.split(np.arange(ROWS), parts):
        part = {name: array[rows] for name, array in arrays.items()}
        (value, found), grads = compute(part["logprobs"], part["entropies"], part)
        total += float(value)
        metrics.append(found)
        for collected, grad in zip(gradients, grads, strict=True):
            collected.append(grad)
    return total, [np.concatenate(gradient) for gradient in gradients], metrics


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", OPTIONS)
def test_loss_gradients_and_metrics(loss_type, beta):
    arrays = some_answers()
    expected, grads, reported = theirs(arrays, 1, loss_type, beta)
    loss, gradients, (metrics,) = ours(arrays, 1, loss_type, beta)
    assert loss == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(gradients[0], grads[0], atol=1e-6)
    assert np.abs(grads[0]).max() > 0.01
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: values[0] for name, values in reported.items()}, abs=1e-6
    )
    if loss_type not in ("sapo", "cispo"):
        assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_max"] > 0


@pytest.mark.parametrize("loss_type", OPTIONS)
def test_a_distance_that_is_multiplied_by_the_ratio(loss_type):
    arrays = some_answers(seed=3)
    expected, grads, reported = theirs(arrays, 1, loss_type, 0.3, by_ratio=True)
    loss, gradients, (metrics,) = ours(arrays, 1, loss_type, 0.3, by_ratio=True)
    assert loss == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(gradients[0], grads[0], atol=1e-6)
    assert float(metrics["kl"]) == pytest.approx(reported["kl"][0], abs=1e-6)
    assert loss != pytest.approx(ours(arrays, 1, loss_type, 0.3)[0], abs=1e-3)


@pytest.mark.parametrize("loss_type", [name for name in OPTIONS if "clip_low" in OPTIONS[name]])
def test_bounds_that_the_ratio_stands_on(loss_type, monkeypatch):
    """Bounds of 1 in the first step: the gradients of jnp.clip and torch.clamp differ there. Ours is torch.clamp's from
    before 2.15; since then it is 0, and the least of two equal terms has half of the gradient."""
    monkeypatch.setitem(CLIPS, loss_type, {**CLIPS.get(loss_type, {}), "clip_low": 0.0, "clip_high": 0.0})
    arrays = some_answers()
    arrays["old_logprobs"] = arrays["logprobs"]
    _, grads, _ = theirs(arrays, 1, loss_type)
    _, gradients, _ = ours(arrays, 1, loss_type)
    ratio = torch.ones((), requires_grad=True)
    torch.min(ratio, ratio.clamp(1.0, 1.0)).backward()
    np.testing.assert_allclose(gradients[0] * ratio.grad.numpy(), grads[0], atol=1e-6)
    assert np.abs(grads[0]).max() > 0.01


GAPS = (60.0, 100.0, 1e4, -100.0, -1e4)


@pytest.mark.parametrize("moved_from", ["old_logprobs", "reference_logprobs"])
@pytest.mark.parametrize("loss_type", OPTIONS)
def test_a_policy_that_has_moved_far_away(loss_type, moved_from):
    """exp(100) is no float32. What TRL has a number for is the same here; where its gradient alone is NaN, 0 · inf, as
    that of a good answer behind the bound is, ours is the 0 that was meant; a loss that is infinite is so in both, and
    ends a run."""
    cases = [(gap, advantage) for gap in GAPS for advantage in (1.0, 0.0, -1.0)]
    beta = 0.0 if moved_from == "old_logprobs" else 0.3
    batches = []
    for gap, advantage in cases:
        batch = {name: np.full((2, 2), -1.0) for name in ("logprobs", "old_logprobs", "reference_logprobs")}
        batch |= {"entropies": np.ones((2, 2)), "mask": np.ones((2, 2)), "advantages": np.array([advantage, 0.5])}
        batch[moved_from][0] += gap if beta else -gap
        batches.append({name: array.astype(np.float32) for name, array in batch.items()})
    stacked = {name: jnp.stack([batch[name] for batch in batches]) for name in batches[0]}

    @jax.jit
    @jax.vmap
    def found(batch):
        def loss(logprobs):
            reference = batch["reference_logprobs"] if beta else None
            others = batch["old_logprobs"], reference, batch["advantages"], batch["mask"]
            return grpo_loss(logprobs, *others, loss_type=loss_type, beta=beta, **CLIPS.get(loss_type, {}))[0]

        return jax.value_and_grad(loss)(batch["logprobs"])

    for case, batch, loss, gradient in zip(cases, batches, *found(stacked), strict=True):
        expected, (grads, _), _ = theirs(batch, 1, loss_type, beta)
        if np.isnan(expected):  # 0 · inf: nothing is to be gained, whatever the ratio
            assert case[1] == 0
            expected = theirs(batches[cases.index((60.0, 0.0))], 1, loss_type, beta)[0]
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7, err_msg=str(case))
        if np.isfinite(expected):
            np.testing.assert_allclose(gradient, np.nan_to_num(grads), rtol=1e-5, atol=1e-7, err_msg=str(case))


@pytest.mark.parametrize("advantages_of", ["answers", "tokens"])
@pytest.mark.parametrize("loss_type", OPTIONS)
@pytest.mark.product
def test_micro_batches_with_an_entropy_bonus(loss_type, advantages_of):
    arrays = some_answers(advantages_of, seed=2)
    expected, grads, reported = theirs(arrays, 4, loss_type, 0.3, 0.2)
    loss, gradients, metrics = ours(arrays, 4, loss_type, 0.3, 0.2)
    assert loss == pytest.approx(expected, abs=1e-6)
    for gradient, grad in zip(gradients, grads, strict=True):
        np.testing.assert_allclose(gradient, grad, atol=1e-6)
        assert np.abs(grad).max() > 0.01
    # Theirs is a mean over micro-batches; for dapo and cispo of parts of one mean.
    scale = 4 if loss_type in TOKEN_AVERAGES else 1
    policy = sum(float(found["policy_loss"]) for found in metrics)
    assert policy == pytest.approx(scale * np.mean(reported["policy_loss"]), abs=1e-6)


@pytest.mark.parametrize("loss_type", TOKEN_AVERAGES)
def test_several_steps_on_one_round_of_answers(loss_type):
    """TRL then divides a step by its share of the tokens of all of them: ours by what `weights` says."""
    arrays, items = some_answers(), 71.0
    expected, grads, _ = theirs(arrays, 2, loss_type, items=items, steps_per_generation=6)
    loss, gradients, _ = ours(arrays, 2, loss_type, tokens=items * 2 / 6)
    assert loss == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(gradients[0], grads[0], atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_advantages(scale):
    """TRL's standard deviation."""
    rewards = torch.tensor([1.0, 4.0, 1.0, 4.0, 0.2, 0.1, -3.0, 0.7])
    groups = rewards.view(2, 4)
    spread = nanstd(groups, dim=1).repeat_interleave(4) if scale == "group" else nanstd(rewards)
    expected = (rewards - groups.mean(dim=1).repeat_interleave(4)) / (spread + 1e-4)
    found = group_advantages(jnp.asarray(rewards.numpy()), 4, scale=scale)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "scale", "expected"),
    [("grpo", "group", 0.0), ("dapo", "group", 0.018425), ("bnpo", "group", 0.018425), ("dr_grpo", "none", 0.03125)],
)
def test_the_first_step_of_a_run_of_trl(loss_type, scale, expected):
    """Measured in TRL: the first answer is rewarded 1, the second 4, and is one token shorter."""
    advantages = group_advantages(jnp.asarray([1.0, 4.0, 1.0, 4.0]), 4, scale=scale)
    size = 1.5 if scale == "none" else 0.866
    np.testing.assert_allclose(advantages, [-size, size, -size, size], atol=1e-4)
    mask = jnp.asarray(np.arange(12) < np.array([12, 11, 12, 12])[:, None])
    logprobs = jnp.full((4, 12), -1.0)
    options = {"max_length": 12} if loss_type == "dr_grpo" else {}

    def loss(policy):
        return grpo_loss(policy, logprobs, None, advantages, mask, loss_type=loss_type, **options)[0]

    value, gradient = jax.value_and_grad(loss)(logprobs)
    assert float(value) == pytest.approx(expected, abs=1e-6)
    assert float(jnp.abs(gradient).max()) > 0.01
