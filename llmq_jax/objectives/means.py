"""From the sums of an objective to means."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def safe_divide(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """total / weight; 0 where nothing counts. Sums over micro-batches, each divided by the weight of the whole batch,
    add up to the batch's mean."""
    return total / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
