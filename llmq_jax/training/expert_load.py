"""What a training step does with the load of experts: it reports it, and moves the bias for selection against it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llmq_jax.layers.expert_balance import all_layers, max_violation, moved_bias
from llmq_jax.layers.moe import Experts, balance_from


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
