"""Experts whose matrices lie apart, for decoding on a CPU.

XLA copies what it takes out of a stack, and for a few tokens that takes longer than the products. Here each expert's
matrices are arrays of their own, and a loop over the experts that any token chose picks one branch each.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmq_jax.layers.expert_weights import Activation, ExpertWeights, through_adapter
from llmq_jax.layers.linear import times_transposed
from llmq_jax.layers.lora import EXPERT_KERNELS

APART = "_apart"
"""After the name of a kernel: the experts' matrices, not stacked."""


def by_expert(variables: dict[str, Any]) -> dict[str, Any]:
    """The same variables with the matrices of stacked experts as arrays of their own, by output as in
    `layers.linear.by_output`."""
    tree = {name: by_expert(leaf) if isinstance(leaf, dict) else leaf for name, leaf in variables.items()}
    for name in EXPERT_KERNELS:
        if name in tree and not isinstance(tree[name], dict):  # a dict is the kernel's adapter
            tree[name + APART] = _apart(tree.pop(name))
    return tree


@jax.jit
def _apart(stack: Float[Array, "E D *features"]) -> tuple[Float[Array, "features D"], ...]:
    return tuple(matrix.reshape(len(matrix), -1).T for matrix in stack)


def through_chosen(x: Array, ids: Array, weights: Array, experts: ExpertWeights, activation: Activation) -> Array:
    """All tokens through each expert that any of them chose, one expert after another; weight 0 for the others."""
    chosen = jax.nn.one_hot(ids, len(experts.up), dtype=jnp.float32)  # all zeros for the id E
    shares = jnp.einsum("mke,mk->em", chosen, weights.astype(jnp.float32))
    used = chosen.any((0, 1))
    order = jnp.argsort(~used, stable=True)
    # A branch for each expert, which refers to that expert's arrays: an index into a stack would copy them.
    branches = [partial(_through_one, expert=e, experts=experts, activation=activation) for e in range(len(experts.up))]

    def add(i: Array, total: Array) -> Array:
        mixed = jax.lax.switch(order[i], branches, x)
        share = shares[order[i]][:, None]
        return total + jnp.where(share == 0, 0, share * mixed.astype(jnp.float32))  # 0 * inf is not 0

    total: Array = jax.lax.fori_loop(0, used.sum(), add, jnp.zeros(x.shape, jnp.float32))
    return total.astype(x.dtype)


def _through_one(
    x: Float[Array, "M D"], expert: int, experts: ExpertWeights, activation: Activation
) -> Float[Array, "M D"]:
    """All tokens through one expert, whose matrices lie apart."""

    def layer(x: Array, matrix: Array, low_rank: tuple[Array, Array] | None, bias: Any) -> Array:
        y = times_transposed(x, matrix.astype(x.dtype))
        if low_rank is not None:
            y += through_adapter(x, low_rank, expert)
        return y if bias is None else y + bias[expert].reshape(-1)

    up, down = experts.up[expert], experts.down[expert]
    activated = activation(layer(x, up, experts.up_low_rank, experts.up_bias).reshape(len(x), -1, down.shape[1]))
    return layer(activated, down, experts.down_low_rank, experts.down_bias)
