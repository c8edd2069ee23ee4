"""Activation functions, by the names that transformers gives them in `config.json`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU, tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2): what GPT-2 was trained with."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU, x Φ(x) with the Gaussian's own distribution function; up to 4.7e-4 away from the tanh form."""
    return jax.nn.gelu(x, approximate=False)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x · sigmoid(x), SiLU or Swish (Elfwing et al. 2017, arXiv:1702.03118, eq. 1)."""
    return jax.nn.silu(x)


def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0)^2 (So et al. 2021, Primer, arXiv:2109.08668, section 4.1)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu_exact,
    "silu": silu,
    "relu2": relu_squared,
}
