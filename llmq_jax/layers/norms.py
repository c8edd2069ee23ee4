"""Normalisation over the model width, always computed in float32."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450, eq. 3-4) with scale and bias.

    epsilon stands inside the root, `(x - mean) / sqrt(var + epsilon)`, as in GPT-2 and PyTorch. Outside of it
    (`std + epsilon`) activations of small magnitude come out visibly different.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normalised = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (normalised * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
