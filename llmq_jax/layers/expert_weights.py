"""The weights of a layer's experts, as the router's module makes them and dispatch reads them."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from flax import struct
from jaxtyping import Array, Float, Int


class ExpertWeights(struct.PyTreeNode):
    """Two linear layers with an activation between them, stacked over experts.

    P is 2 in gated experts (the gate, then what it multiplies) and 1 in plain ones.
    """

    # Any, because leaves may also be the gradients of a single expert, shapes or shardings.
    up: Any
    """[E, D, P, F]; or apart and by output: a tuple of E matrices [P F, D]."""
    down: Any
    """[E, F, D]; or a tuple of E matrices [D, F]."""
    up_bias: Any = None
    """[E, P, F], or None."""
    down_bias: Any = None
    """[E, D], or None."""
    up_low_rank: Any = None
    """Adapters (A [E, D, R], B [E, R, P, F]), whose product is added to `up`; or None."""
    down_low_rank: Any = None
    """(A [E, F, R], B [E, R, D]), or None."""


WEIGHTS = tuple(field.name for field in fields(ExpertWeights))
Activation = Callable[[Float[Array, "*rows P F"]], Float[Array, "*rows F"]]


def through_adapter(
    rows: Float[Array, "M D"], pair: tuple[Array, Array], expert: Int[Array, ""] | int
) -> Float[Array, "M F"]:
    """Rows through the adapter of an expert."""
    first, last = (leaf[expert] for leaf in pair)
    return (rows @ first) @ last.reshape(last.shape[0], -1)
