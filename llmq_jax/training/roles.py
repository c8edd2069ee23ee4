"""What a parameter is, by its name: never by the rank of its array, since stacked norms are two-dimensional."""

from typing import Any

import jax

from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import path_names

# The last part of a parameter's path.
ROLES = {
    "kernel": "kernel",
    "up_kernel": "kernel",  # of stacked experts
    "down_kernel": "kernel",
    "up_bias": "bias",
    "down_bias": "bias",
    "shared_weight": "bias",
    "embedding": "embedding",
    "scale": "norm",
    "bias": "bias",
    "alpha": "norm",  # of DyT
    "A": "kernel",  # of adapters
    "B": "kernel",
    "M": "kernel",
    "v": "kernel",
    "magnitude": "norm",
}


def role(path: tuple[str, ...]) -> str:
    """The role of the parameter at a path: "kernel", "embedding", "norm" or "bias". BadInput: its name is not in
    ROLES."""
    if path[-1] not in ROLES:
        raise BadInput(
            f"parameter {'/'.join(path)} has no role; give the name {path[-1]!r} one in {__name__}.ROLES: kernel or "
            "embedding, which decay, norm or bias, which do not"
        )
    return ROLES[path[-1]]


def roles(params: dict[str, Any]) -> dict[str, Any]:
    """The same tree with each parameter's role in its place."""
    named: dict[str, Any] = jax.tree_util.tree_map_with_path(lambda path, _: role(path_names(path)), params)
    return named
