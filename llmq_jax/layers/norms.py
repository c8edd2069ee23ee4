"""Normalisation over the model width, before each sub-layer and after the last one; or DyT in its place.

All compute in float32 and return the type that they were given. `NORMS` names them, and `norm_layer` makes one: any
decoder takes any of them.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from llmq_jax.layers.axes import target_platform
from llmq_jax.layers.repetition import repeated


def mean(x: Float[Array, "*batch D"], epsilon: float = 0.0) -> Float[Array, "*batch 1"]:
    """The mean over the last axis, plus epsilon.

    Of a single vector, as in decoding one row, both constants go into the terms of the sum: XLA's GPU backend makes one
    kernel of a norm, which the product after it may join, unless a constant stands between the sum and its use.
    """
    if x.size == x.shape[-1] and target_platform() == "gpu":
        return ((x + epsilon) / x.shape[-1]).sum(-1, keepdims=True)
    return x.mean(-1, keepdims=True) + epsilon


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450, eq. 3-4) with scale and bias.

    epsilon is inside the root, `(x - mean) / sqrt(var + epsilon)`, as in GPT-2 and PyTorch. Outside of it
    (`std + epsilon`), activations of small magnitude come out visibly different.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - mean(wide)
        normalised = centred * lax.rsqrt(mean(jnp.square(centred), self.epsilon))
        return (normalised * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4): neither mean nor bias.

    As in Llama, epsilon is inside the root, and the normalised values are rounded to the type of x before the scale
    multiplies them.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normalised = wide * lax.rsqrt(mean(jnp.square(wide), self.epsilon))
        return normalised.astype(x.dtype) * repeated(scale, x)


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm whose scale is 1 + `scale`: what is learned starts at 0, and weight decay pulls it towards no scaling.

    As in Gemma, the scale multiplies the normalised values in float32, and the product is rounded to the type of x.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normalised = wide * lax.rsqrt(mean(jnp.square(wide), self.epsilon))
        return (normalised * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


class DyT(nn.Module):
    """Dynamic Tanh (Zhu et al. 2025, arXiv:2503.10622, section 4): `scale * tanh(alpha * x) + bias`, no statistics.

    alpha is one learned number, at first `alpha_init`. In language models the embeddings are scaled up by a learned
    factor too (`EmbeddingScale`), because a tanh, unlike a norm, depends on the size of activations.
    """

    alpha_init: float = 0.5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        alpha = self.param("alpha", nn.initializers.constant(self.alpha_init), ())
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        alpha, scale, bias = (parameter.astype(jnp.float32) for parameter in (alpha, scale, bias))
        return (scale * jnp.tanh(alpha * x.astype(jnp.float32)) + bias).astype(x.dtype)


# Zhu et al. 2025, section 7 and appendix: where alpha starts in language models, by model width, before attention and
# elsewhere (before the feed-forward network and the head). Their weights start as normal(0.02).
ALPHA_INIT = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}


def alpha_init(width: int, before_attention: bool, initializer_range: float = 0.02) -> float:
    """The table's value at the width nearest to ours, by ratio.

    Activations start at about initializer_range · sqrt(D); the larger they are, the smaller alpha must be, or the tanh
    saturates. The table is for a range of 0.02: another range counts as the width at which 0.02 gives the same product.
    """
    alike = width * (initializer_range / 0.02) ** 2
    listed = min(ALPHA_INIT, key=lambda w: abs(math.log(w / alike)))
    return ALPHA_INIT[listed][0 if before_attention else 1]


class EmbeddingScale(nn.Module):
    """One learned factor on the embeddings, sqrt(D) at first (Zhu et al. 2025, section 5, on LLaMA)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.constant(x.shape[-1] ** 0.5), ())
        return x * repeated(scale, x)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer_norm": LayerNorm,
    "rms_norm": RMSNorm,
    "zero_centred_rms_norm": ZeroCentredRMSNorm,
    "dyt": DyT,
}


def norm_layer(
    norm: str,
    epsilon: float,
    width: int,
    initializer_range: float,
    name: str | None = None,
    before_attention: bool = False,
) -> nn.Module:
    """The norm of this name in a config. Its class takes `epsilon`; DyT takes the initial alpha instead, which depends
    on the width, the place and the range of initial weights."""
    if norm == "dyt":
        return DyT(alpha_init(width, before_attention, initializer_range), name=name)
    return NORMS[norm](epsilon, name=name)
