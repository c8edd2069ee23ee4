"""The one linear layer: every product of activations with a weight matrix goes through it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from llmq_jax.layers.lora import LORA, LORA_FIXED, adapted

KERNEL, KERNEL_BY_OUTPUT, KERNELS_BY_OUTPUT = "kernel", "kernel_by_output", "kernels_by_output"
# Layers of one input, under the names that attention and feed-forward networks give them.
SIDE_BY_SIDE = (
    ("query", "key", "value"),
    ("query", "latent_down"),
    ("query_down", "latent_down"),
    ("gate", "up"),
)


class Linear(nn.Module):
    """`y = x W + b` over the last axis of x, with a kernel laid out (in, out...).

    `features` may have several axes: attention asks for (3, N, H) and gets queries, keys and values apart and split
    into heads without a reshape, so that heads stay an axis that can be sharded.

    Parameters from `by_output` hold the kernel as (out, in), for a single row of x; they have no adapters, which are
    merged into them before (`lora.merge`).
    """

    features: int | tuple[int, ...]
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Dtype | None = None
    """Type to compute in; None computes in the kernel's own type."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch D"],
        product: Float[Array, "..."] | None = None,
        batch: tuple[int, ...] | None = None,
    ) -> Float[Array, "..."]:
        """`product`: x W, where `side_by_side` has formed it already. `batch`: the leading shape of the result, where x
        comes as rows [M, D]."""
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        width = x.shape[-1]
        if product is not None:
            y = product
        elif self.has_variable("params", KERNEL_BY_OUTPUT):
            y = _product(x, self.get_variable("params", KERNEL_BY_OUTPUT), 1, self.dtype)
        else:
            # Initialised as the flat matrix it is, so that initialisers see fan-in = D and fan-out = all features.
            kernel: Array = self.param(
                KERNEL,
                lambda key: self.kernel_init(key, (width, math.prod(features))).reshape(width, *features),
            )
            y = _product(x, kernel, 0, self.dtype)
        y = y.reshape(-1, *features)
        if self.has_variable(LORA_FIXED, KERNEL):
            adapter: dict[str, Any] = {name: self.get_variable(name, KERNEL) for name in (LORA, LORA_FIXED)}
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            rows = x.reshape(-1, width)
            y = adapted(rows, y, self.get_variable("params", KERNEL), adapter[LORA], adapter[LORA_FIXED], key)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features)
            y = y + bias.astype(y.dtype)
        return y.reshape(*(x.shape[:-1] if batch is None else batch), *features)


def _product(x: Float[Array, "*batch D"], kernel: Array, axis: int, dtype: Dtype | None) -> Float[Array, "B ..."]:
    """x times a kernel, over its features and an axis of the kernel."""
    dtype = dtype or kernel.dtype
    # Batch and time become one axis first: from [B, T, D] XLA's CPU backend writes slow transposes for the kernel's
    # gradient (1.2 times the time of a whole training step).
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    return jax.lax.dot_general(rows, kernel.astype(dtype), (((1,), (axis,)), ((), ())))


def side_by_side(x: Float[Array, "*batch D"], *linears: Linear) -> tuple[Float[Array, "..."], ...]:
    """`linear(x)` for each. Kernels that `by_output` has joined (`SIDE_BY_SIDE`) are one product, split afterwards."""
    first = linears[0]
    if not first.has_variable("params", KERNELS_BY_OUTPUT):
        rows = x.reshape(-1, x.shape[-1])  # one array, that the backward pass keeps once for all
        return tuple(linear(rows, batch=x.shape[:-1]) for linear in linears)
    kernel: Array = first.get_variable("params", KERNELS_BY_OUTPUT)
    ends = np.cumsum([np.prod(linear.features) for linear in linears])
    products = jnp.split(_product(x, kernel, 1, first.dtype), ends[:-1], axis=1)
    return tuple(linear(x, product) for linear, product in zip(linears, products, strict=True))


def by_output(variables: dict[str, Any]) -> dict[str, Any]:
    """The same variables with every `Linear`'s kernel as (out, in): each output reads a run of memory.

    XLA's CPU backend multiplies a single row by such a matrix at the speed of memory, 1.1 to 1.5 times as fast as by
    (in, out); several rows 1.4 times as slowly. Kernels that stand side by side become one, which the first holds: one
    product of 1 MB and more where small ones would wait for each other's threads.
    """
    tree = {name: by_output(leaf) if isinstance(leaf, dict) else leaf for name, leaf in variables.items()}
    if KERNEL in tree:
        tree[KERNEL_BY_OUTPUT] = _transposed(tree.pop(KERNEL))
    for names in SIDE_BY_SIDE:
        if all(KERNEL_BY_OUTPUT in tree.get(name, ()) for name in names):
            kernels = [tree[name].pop(KERNEL_BY_OUTPUT) for name in names]
            tree[names[0]][KERNELS_BY_OUTPUT] = jnp.concatenate(kernels)
    return tree


def flat_by_output(params: dict[str, Any]) -> Float[Array, "out D"]:
    """The kernel of a `Linear`'s parameters, however they hold it."""
    flat: Array = params[KERNEL_BY_OUTPUT] if KERNEL_BY_OUTPUT in params else _transposed(params[KERNEL])
    return flat


@jax.jit
def _transposed(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(kernel.shape[0], -1).T
