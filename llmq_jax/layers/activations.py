"""Activation functions, by the names that transformers gives them in `config.json`.

All of transformers' functions are here except `prelu` and `xielu`, which have learned parameters.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import erf
from jaxtyping import Array, Float


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU, tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2): what GPT-2 was trained with."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU, x Φ(x) with Φ the standard normal distribution function; up to 4.7e-4 away from the tanh form."""
    return jax.nn.gelu(x, approximate=False)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x · sigmoid(x), SiLU or Swish (Elfwing et al. 2017, arXiv:1702.03118)."""
    return jax.nn.silu(x)


def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0)^2 (So et al. 2021, Primer, arXiv:2109.08668, section 4.1)."""
    return jnp.square(jax.nn.relu(x))


def gelu_quick(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x · sigmoid(1.702 x), another form of GELU (arXiv:1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_clipped(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU clipped to [-10, 10], for low-bit integer quantisation (Wu et al. 2020, arXiv:2004.09602)."""
    return _between(-10.0, gelu_exact(x), 10.0)


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """min(max(x, 0), 6)."""
    return _between(0.0, x, 6.0)


def leaky_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x where it is positive, else 0.01 x. The gradient at 0 is 0.01, as in torch; `jax.nn.leaky_relu` has 1."""
    return jnp.where(x > 0, x, 0.01 * x)


def _between(low: float, x: Array, high: float) -> Array:
    """x clipped to [low, high]. At the bounds the gradient is 0, as in torch; `jnp.clip` has 1/2."""
    return lax.clamp(jnp.asarray(low, x.dtype), x, jnp.asarray(high, x.dtype))


def laplace(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The distribution function of a normal whose mean and variance make value and slope equal those of max(x, 0)^2 at
    x = sqrt(1/2) (Ma et al. 2022, Mega, arXiv:2209.10655)."""
    mean, deviation = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
    return 0.5 * (1.0 + erf((x - mean) / (deviation * math.sqrt(2.0))))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu_exact,
    "gelu_10": gelu_clipped,
    "quick_gelu": gelu_quick,
    "silu": silu,
    "mish": jax.nn.mish,
    "hardswish": lambda x: x * relu6(x + 3.0) / 6.0,
    "relu": jax.nn.relu,
    "relu2": relu_squared,
    "relu6": relu6,
    "leaky_relu": leaky_relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "laplace": laplace,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "linear": lambda x: x,
}
