"""The advantages of GRPO: how much better an answer did than the others of its group, so that no critic is trained.

DeepSeekMath (Shao et al. 2024, arXiv:2402.03300), sections 4.1.2 (one reward per answer) and 4.1.3 (one reward per step
of an answer). What the policy learns from them is in `objectives.grpo`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.errors import BadInput, did_you_mean

SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Float[Array, " B"] | Sequence[float],
    group_size: int,
    *,
    scale: str = "group",
    epsilon: float = 1e-4,
) -> Float[Array, " B"]:
    """How much better each answer did than its group: A_i = (r_i - mean(r)) / (std(r) + ε).

    Each `group_size` consecutive rewards are those of answers to one question. `scale` says which unbiased standard
    deviation divides: that of the rewards of the "group" (DeepSeekMath, section 4.1.2) or of the whole "batch", or
    "none" (Dr. GRPO: dividing by the group's favours questions that are too easy or too hard). The mean is always the
    group's. Where all rewards of a group are equal, the advantages are exactly 0. BadInput: rewards that are no whole
    number of groups, a scale that is unknown, a group of one with scale "group".
    """
    groups = _groups(jnp.asarray(rewards), group_size, scale)
    if scale == "group" and group_size == 1:
        raise BadInput("a group of one answer has no spread to divide by; sample group_size=2 or more, or scale='none'")
    return _standardised(groups, jnp.ones_like(groups), scale, epsilon).reshape(-1)


def process_advantages(
    step_rewards: Float[Array, "B C"],
    step_ends: Float[Array, "B C"] | Int[Array, "B C"] | Bool[Array, "B C"],
    group_size: int,
    *,
    scale: str = "group",
    epsilon: float = 1e-4,
) -> Float[Array, "B C"]:
    """Advantages of tokens where the steps of an answer are rewarded, not its outcome (DeepSeekMath, section 4.1.3).

    `step_ends` is 1 on the last token of each step, where `step_rewards` has the step's reward. Rewards are normalised
    as in `group_advantages`, by the mean and the standard deviation over all steps of all answers of the group. A
    token's advantage is the sum of the normalised rewards of the steps that end at it or after it; after the last step
    it is 0.
    """
    groups, counted = _groups(step_rewards, group_size, scale), _groups(step_ends, group_size, scale)
    relative = _standardised(groups, counted.astype(jnp.float32), scale, epsilon).reshape(step_rewards.shape)
    return jnp.cumsum(relative[:, ::-1], axis=1)[:, ::-1]


def _groups(values: Array, group_size: int, scale: str) -> Array:
    """[B, ...] to [groups, all values of a group]."""
    if scale not in SCALES:
        raise BadInput(f"scale={scale!r} of advantages is unknown; {did_you_mean(scale, SCALES)}")
    if group_size < 1 or len(values) % group_size:
        raise BadInput(f"{len(values)} answers are no whole number of groups of {group_size}; change one of the two")
    return values.reshape(len(values) // group_size, -1)


def _standardised(rewards: Array, counted: Array, scale: str, epsilon: float) -> Array:
    """(r - mean of its group) / (standard deviation + ε) where `counted` is 1, elsewhere 0. All are [groups, N]."""
    centred, deviation = _centred(rewards, counted, axis=1)
    if scale == "none":
        return centred
    if scale == "batch":
        _, deviation = _centred(rewards, counted, axis=None)
    # Without spread and without ε: 0, not NaN.
    return centred / jnp.maximum(deviation + epsilon, jnp.finfo(jnp.float32).tiny)


def _centred(rewards: Array, counted: Array, axis: int | None) -> tuple[Array, Array]:
    """(r - mean(r), unbiased standard deviation) along an axis, or of all.

    The lowest reward is subtracted first: equal rewards become zeros, whose mean is exactly 0. The mean of other equal
    numbers may be off by rounding (three times 1.7 in float32), which a division by ε would turn into an advantage.
    """
    lowest = jnp.where(counted > 0, rewards, jnp.inf).min(axis=axis, keepdims=True)
    above = jnp.where(counted > 0, rewards - lowest, 0.0)
    number = counted.sum(axis=axis, keepdims=True)
    centred = (above - above.sum(axis=axis, keepdims=True) / jnp.maximum(number, 1)) * counted
    variance = (centred**2).sum(axis=axis, keepdims=True) / jnp.maximum(number - 1, 1)
    return centred, jnp.sqrt(variance)
