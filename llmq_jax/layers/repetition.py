"""Parameters that all tokens share, repeated for each of them, and weights of tokens, for each of their features."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmq_jax.layers.axes import target_platform


def repeated(parameter: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """The parameter in the type of `like`, to be added to it or multiplied by it; on an accelerator with a gradient
    that is summed over the tokens in float32.

    By itself JAX writes that sum in the type of `like`. In bfloat16, of 8 bits, an NVIDIA GPU then rounds after every
    addition, and what is small beside the sum so far is lost. XLA's CPU backend rounds a few partial sums only.
    """
    rounded = parameter.astype(like.dtype)
    if jnp.finfo(like.dtype).bits >= 32 or target_platform() == "cpu":
        return rounded
    return jnp.broadcast_to(rounded.astype(jnp.float32), like.shape).astype(like.dtype)
