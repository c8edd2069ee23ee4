"""The load of experts in a training step: its metrics, and the biases for selection, which are moved against it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llmq_jax.layers.expert_balance import all_layers, max_violation, moved_bias
from llmq_jax.layers.moe import Experts, balance_from


def load_metrics(experts: Experts | None, counts: dict[str, Any]) -> dict[str, Array]:
    """Metrics of the assignments of a whole step: `expert_load` [layers, experts]; `max_violation`, how far the fullest
    expert is above the mean load, as a mean over layers; with a capacity factor also `dropped`, the share that was
    dropped."""
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

    Layers that took no part in the step, such as modules of multi-token prediction that are not trained, keep their
    bias.
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
