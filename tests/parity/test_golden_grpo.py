"""The original repository's GRPO: advantages, loss and gradients, and the losses of its training loops.

It averages over the tokens of the batch, as `dapo`, and takes the whole batch for one group, without an ε.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.objectives.advantages import group_advantages
from llmq_jax.objectives.grpo import LossOptions, grpo_loss, kl_estimate, policy_ratio, surrogate
from tests.parity.golden import read_golden

LOOPS = ("grpo_training_loop", "grpo_training_loop_single_prompt", "grpo_training_loop_variant_experimental")


def read(name):
    arrays, meta = read_golden(name)
    return {name: array if array.dtype.kind == "U" else jnp.asarray(array) for name, array in arrays.items()}, meta


def whole_batch(rewards):
    return group_advantages(rewards, len(rewards), epsilon=0.0)


@pytest.mark.parametrize("case", [0, 1])
def test_the_loss_step_by_step(case):
    arrays, meta = read("grpo_loss")
    eps, beta = meta["cases"][case]["eps"], meta["cases"][case]["beta"]
    policy, old, reference = (arrays[f"in/{name}_logprobs"] for name in ("policy", "old", "ref"))
    mask = arrays["in/loss_mask"]
    advantages = whole_batch(arrays["in/rewards"])
    np.testing.assert_allclose(advantages, arrays["out/advantages"], atol=1e-6)
    ratio = policy_ratio(policy, old, jnp.ones(mask.shape), sequence=False)
    np.testing.assert_allclose(ratio, arrays["out/ratio"], rtol=1e-6)
    kl = kl_estimate(policy, reference)
    np.testing.assert_allclose(kl, arrays["out/kl"], atol=1e-6)
    options = LossOptions(loss_type="dapo", clip_low=eps)
    name = f"eps{eps}_beta{beta}"
    losses = beta * kl - surrogate(ratio, policy, advantages[:, None], options)
    np.testing.assert_allclose(losses, arrays[f"out/{name}/loss_per_token_unmasked"], atol=1e-6)

    def loss(policy):
        found, _ = grpo_loss(policy, old, reference, advantages, mask, loss_type="dapo", clip_low=eps, beta=beta)
        return found

    value, gradient = jax.value_and_grad(loss)(policy)
    np.testing.assert_allclose(value, arrays[f"out/{name}/loss"], atol=1e-6)
    np.testing.assert_allclose(gradient, arrays[f"grad/{name}/policy_logprobs"], atol=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_losses_of_a_training_loop(loop):
    """Two updates on the same answers: at the first the ratio is 1."""
    arrays, meta = read(loop)
    advantages = whole_batch(arrays["out/rewards"])
    np.testing.assert_allclose(advantages, arrays["out/advantages"], atol=2e-6)
    for update in range(meta["num_grad_updates"]):
        loss, metrics = grpo_loss(
            arrays[f"out/policy_logprobs/{update}"],
            arrays["out/old_logprobs"],
            arrays["out/ref_logprobs"],
            advantages,
            arrays["out/reward_masks"][:, 1:],
            loss_type="dapo",
            clip_low=meta["eps"],
            beta=meta["beta"],
        )
        np.testing.assert_allclose(loss, arrays[f"out/loss/{update}"], atol=1e-6)
        assert (float(metrics["kl"]) > 1e-3) == (update > 0)
