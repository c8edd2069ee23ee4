"""The one linear layer: every product of activations with a weight matrix goes through it."""

import math

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

KERNEL, KERNEL_BY_OUTPUT = "kernel", "kernel_by_output"


class Linear(nn.Module):
    """`y = x W + b` over the last axis of x, with a kernel laid out (in, out...).

    `features` may have several axes: attention asks for (3, N, H) and gets queries, keys and values apart and split
    into heads without a reshape, so that heads stay an axis that can be sharded.

    Parameters from `by_output` hold the kernel as (out, in), for a single row of x.
    """

    features: int | tuple[int, ...]
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Dtype | None = None
    """Type to compute in; None computes in the kernel's own type."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        width = x.shape[-1]
        if by_output := self.has_variable("params", KERNEL_BY_OUTPUT):
            kernel = self.get_variable("params", KERNEL_BY_OUTPUT)
        else:
            # Initialised as the flat matrix it is, so that initialisers see fan-in = D and fan-out = all features.
            kernel = self.param(
                KERNEL,
                lambda key: self.kernel_init(key, (width, math.prod(features))).reshape(width, *features),
            )
        dtype = self.dtype or kernel.dtype
        # Batch and time become one axis first: from [B, T, D] XLA's CPU backend writes slow transposes for the
        # kernel's gradient (1.2 times the time of a whole training step).
        rows = x.astype(dtype).reshape(-1, width)
        y = jax.lax.dot_general(rows, kernel.astype(dtype), (((1,), (1 if by_output else 0,)), ((), ())))
        y = y.reshape(-1, *features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features)
            y = y + bias.astype(dtype)
        return y.reshape(*x.shape[:-1], *features)


def by_output(variables: dict) -> dict:
    """The same variables with every `Linear`'s kernel as (out, in): each output reads a run of memory.

    XLA's CPU backend multiplies a single row by such a matrix at the speed of memory, 1.1 to 1.5 times as fast as by
    (in, out); several rows 1.4 times as slowly.
    """
    return unflatten_dict(
        {
            (*path, KERNEL_BY_OUTPUT) if name == KERNEL else (*path, name): _transposed(leaf)
            if name == KERNEL
            else leaf
            for (*path, name), leaf in flatten_dict(variables).items()
        }
    )


@jax.jit
def _transposed(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(kernel.shape[0], -1).T
