"""From the sums of an objective to means, and from the metrics of parts of a batch to those of all of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EXTREMES = {
    "min_reward": jnp.minimum,
    "max_reward": jnp.maximum,
    "clip_ratio/low_min": jnp.minimum,
    "clip_ratio/high_max": jnp.maximum,
}
"""Metrics that do not add over batches, but are the least or the greatest of them."""
COLLECTIVES: dict[str, Callable[..., Any]] = {
    **{name: jax.lax.pmin if pick is jnp.minimum else jax.lax.pmax for name, pick in EXTREMES.items()},
    "coefficient": jax.lax.pmax,  # a weight that is the same in every part of a batch
}
"""What is not summed over devices, and how it is combined instead."""


def combined(name: str, a: Any, b: Any) -> Any:
    """A metric of two parts of a batch, or of two batches: the least or the greatest in EXTREMES, otherwise the sum."""
    return EXTREMES.get(name, jnp.add)(a, b)


def over_devices(named: dict[str, Any], axis: str) -> dict[str, Any]:
    """Metrics or weights of a whole batch, from those of the parts that devices along an axis of `jax.pmap` have."""
    add: Callable[..., Any] = jax.lax.psum
    return {name: COLLECTIVES.get(name, add)(value, axis) for name, value in named.items()}


def safe_divide(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """total / weight; 0 where nothing counts. Sums over micro-batches, each divided by the weight of the whole batch,
    add up to the batch's mean."""
    return total / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
