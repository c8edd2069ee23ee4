"""Training a part of a model: its head, its last layers, or adapters beside it.

What stays as it is stands in a collection of its own, `frozen`, beside `params`, which train. Where a stack of layers
is cut in two, its upper layers are another stack, `group_0_upper` beside `group_0`, which the model runs after it
(`Decoder.frozen_layers`): gradients end there, and neither time nor memory goes to the layers below.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from llmq_jax.errors import BadInput
from llmq_jax.models.decoder import Decoder, upper_part

FROZEN, PARAMS = "frozen", "params"


def as_read(variables: dict) -> dict:
    """The variables that a model reads, of those that a training state holds."""
    if FROZEN not in variables:
        return variables
    rest = {name: tree for name, tree in variables.items() if name != FROZEN}
    return {**rest, PARAMS: {**variables[FROZEN], **variables[PARAMS]}}


def whole(variables: dict) -> dict:
    """The same for the model as it was: the layers that stood apart are one stack again."""
    return {name: _joined(tree) for name, tree in as_read(variables).items()}


def _joined(tree: dict) -> dict:
    uppers = {upper_part(name): name for name in tree if upper_part(name) in tree}
    joined = {name: leaf for name, leaf in tree.items() if name not in uppers}
    for upper, lower in uppers.items():
        joined[lower] = jax.tree.map(lambda low, up: jnp.concatenate([low, up]), tree[lower], tree[upper])
    return joined


def freeze_all_but(model: Decoder, variables: dict, blocks: int, heads: Collection[str]) -> tuple[Decoder, dict]:
    """(the model, variables) of which the last `blocks` layers, the final norm and `heads` train; with 0 blocks the
    heads alone. Names of `heads` that the model lacks are passed over."""
    layers = model.layer_slots()
    if not 0 <= blocks <= len(layers):
        raise BadInput(f"{blocks} blocks cannot train: the model has {len(layers)}")
    frozen_layers = len(layers) - blocks
    trained = {*heads, *(("final_norm",) if blocks else ())}
    cut: dict[str, int] = {}
    at = 0
    for i, group in enumerate(model.layer_groups()):
        size = group.repeats * len(group.blocks)
        below = min(max(frozen_layers - at, 0), size)
        at += size
        if below % len(group.blocks):
            raise BadInput(
                f"{blocks} blocks cut through a pattern of {len(group.blocks)} layers, which stand together; "
                f"choose a number that leaves a multiple of them below"
            )
        if below == 0:
            trained.add(f"group_{i}")
        elif below < size:
            cut[f"group_{i}"] = below // len(group.blocks)

    def divided(tree: dict) -> dict:
        parts: dict[str, Any] = {}
        for name, leaf in tree.items():
            if name in cut:
                parts[name] = jax.tree.map(lambda x, n=cut[name]: x[:n], leaf)
                parts[upper_part(name)] = jax.tree.map(lambda x, n=cut[name]: x[n:], leaf)
            else:
                parts[name] = leaf
        return parts

    variables = {name: divided(tree) for name, tree in variables.items()}
    trained |= set(map(upper_part, cut))
    params = variables.pop(PARAMS)
    parts = {
        PARAMS: {name: leaf for name, leaf in params.items() if name in trained},
        FROZEN: {name: leaf for name, leaf in params.items() if name not in trained},
    }
    return model.clone(frozen_layers=frozen_layers if cut else 0), {**variables, **parts}
