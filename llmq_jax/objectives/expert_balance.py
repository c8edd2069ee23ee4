"""What experts add to an objective, and what a training step does with their load.

The balance losses are products of means over a batch. They are taken of each micro-batch and averaged, by the number of
its targets: the one part of a loss that accumulation changes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmq_jax.layers.expert_balance import Balance, all_layers, balance_losses, max_violation, moved_bias
from llmq_jax.layers.moe import Experts, balance_from


def balance_terms(
    experts: Experts | None, counts: dict[str, Any], share: Float[Array, ""]
) -> tuple[Float[Array, ""] | float, dict[str, Array]]:
    """(Σ coefficient · loss, each loss before its coefficient and the largest violation by name), times this
    micro-batch's `share` of the batch. Without experts: 0 and nothing."""
    reports = all_layers(counts)
    if reports is None:
        return 0.0, {}
    assert experts is not None
    balance = balance_from(experts.balance) or Balance()
    losses = balance_losses(reports, balance, experts.top_k)
    metrics = {f"{name}_loss": share * loss for name, loss in losses.items()}
    penalty = sum((getattr(balance, name) * share * loss for name, loss in losses.items()), 0.0)
    return penalty, {**metrics, "max_violation_batch": share * max_violation(reports.assigned).mean()}


def with_balance_losses(
    loss: Float[Array, ""],
    metrics: dict[str, Array],
    counts: dict[str, Any],
    experts: Experts | None,
    share: Float[Array, ""],
    *,
    name: str,
) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
    """What an objective returns in training, from its loss, metrics and counts: (what is minimised, metrics, counts).

    Training minimises the loss plus the balance losses of experts. The metrics then hold these too, and the loss itself
    by its own `name`, such as "next_token_loss". Without experts nothing is added, and all stays as it is. `share` is
    this micro-batch's part of the batch.
    """
    penalty, balance = balance_terms(experts, counts, share)
    if balance:
        metrics = {name: loss, **metrics, **balance}
    return loss + penalty, metrics, counts


def load_metrics(experts: Experts | None, counts: dict[str, Any]) -> dict[str, Array]:
    """Of the assignments of a whole step: `expert_load` [layers, experts], and the mean over layers of the largest
    violation; with fixed slots also the part that was dropped."""
    reports = all_layers(counts)
    if reports is None:
        return {}
    assert experts is not None
    metrics = {"max_violation": max_violation(reports.assigned).mean(), "expert_load": reports.assigned}
    if experts.capacity_factor is not None:
        metrics["dropped"] = reports.dropped.sum() / jnp.maximum(reports.assigned.sum(), 1)
    return metrics


def move_biases(experts: Experts | None, router: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """The collection "router" after a step: every layer's bias for selection, moved against its load.

    What took no part in the step, as modules of multi-token prediction need not, keeps its bias.
    """
    balance = None if experts is None else balance_from(experts.balance)
    if balance is None or not balance.bias_rate:
        return router

    def moved(path: tuple[Any, ...], bias: Array) -> Array:
        group, block = (entry.key for entry in path[:2])
        if group not in counts:
            return bias
        return moved_bias(bias, counts[group][block]["router"].assigned, balance)

    after: dict[str, Any] = jax.tree_util.tree_map_with_path(moved, router)
    return after
