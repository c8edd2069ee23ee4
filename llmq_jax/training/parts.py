"""Training a part of a model: its head, its last layers, or adapters beside it.

Frozen parameters are in a collection of their own, `frozen`, beside `params`, which train. Where a group of layers is
cut in two, its upper layers become another group, `group_0_upper` beside `group_0`, which the model runs after it
(`Decoder.frozen_layers`): gradients end there, and neither time nor memory goes to the layers below.

    {"params": {"group_0_upper", "final_norm"}, "frozen": {"token_embedding", "group_0"}}     the last blocks
    {"params": {...}, "lora": {"group_0_upper"}, "lora_fixed": {...}}                         adapters of the last ones
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.layers.lora import LORA, LORA_FIXED, SCALE, adapters, trained_whole
from llmq_jax.models.decoder import PARAMS, Decoder, upper_part

FROZEN = "frozen"


def as_read(variables: dict[str, Any]) -> dict[str, Any]:
    """A training state's variables in the form that its model reads: frozen parameters among the others."""
    if FROZEN not in variables:
        return variables
    rest = {name: tree for name, tree in variables.items() if name != FROZEN}
    return {**rest, PARAMS: {**variables[FROZEN], **variables[PARAMS]}}


def whole(variables: dict[str, Any]) -> dict[str, Any]:
    """A training state's variables in the form that the original model reads: layers that were cut in two are one group
    again."""
    variables = as_read(variables)
    return {name: _joined(tree, variables[PARAMS]) for name, tree in variables.items()}


def _joined(tree: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """A collection in which groups that were cut are joined. Adapters have no lower part: zeros take its place."""
    joined = dict(tree)
    for lower in params:
        upper = joined.pop(upper_part(lower), None)
        if upper is None:
            continue
        below = len(jax.tree.leaves(params[lower])[0])
        low = tree.get(lower) or jax.tree.map(lambda x, n=below: jnp.zeros((n, *x.shape[1:]), x.dtype), upper)
        joined[lower] = jax.tree.map(lambda low, up: jnp.concatenate([low, up]), low, upper)
    return joined


def cut(model: Decoder, variables: dict[str, Any], blocks: int) -> tuple[Decoder, dict[str, Any], set[str]]:
    """(the model, variables, names of the groups below) with the last `blocks` layers in groups of their own."""
    layers = len(model.layer_paths())
    if not 0 <= blocks <= layers:
        raise BadInput(f"{blocks} blocks cannot train: the model has {layers}; give that many or fewer")
    model = model.clone(frozen_layers=layers - blocks)
    groups = model.groups()
    below, at = set(), 0
    for name, group in groups.items():
        at += group.repeats * len(group.blocks)
        if at <= layers - blocks:
            below.add(name)
        elif at - group.repeats * len(group.blocks) < layers - blocks:
            raise BadInput(
                f"{blocks} blocks cut through a pattern of {len(group.blocks)} layers, which stand together; choose a "
                f"number that leaves a multiple of {len(group.blocks)} below"
            )

    def divided(tree: dict[str, Any]) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, leaf in tree.items():
            if upper_part(name) in groups:
                count = groups[name].repeats
                parts[name] = jax.tree.map(lambda x, n=count: x[:n], leaf)
                parts[upper_part(name)] = jax.tree.map(lambda x, n=count: x[n:], leaf)
            else:
                parts[name] = leaf
        return parts

    return model, {name: divided(tree) for name, tree in variables.items()}, below


def freeze_all_but(
    model: Decoder, variables: dict[str, Any], blocks: int, heads: Collection[str]
) -> tuple[Decoder, dict[str, Any]]:
    """(the model, variables) of which the last `blocks` layers, the final norm and `heads` train; with 0 blocks the
    heads alone. Names of `heads` that the model lacks are passed over."""
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(variables[PARAMS])} - {"float32"}
    if types and model.dtype is None:
        raise BadInput(
            f"parameters in {', '.join(types)} stay so where they are frozen, and those that train are float32: say "
            "what to compute in, lq.build(config, dtype=...), or load them in float32"
        )
    model, variables, below = cut(model, variables, blocks)
    trained = {*heads, *((set(model.groups()) - below | {"final_norm"}) if blocks else ())}
    return model, freeze(variables, variables[PARAMS].keys() - trained)


def freeze(variables: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The variables with these parameters frozen."""
    params = variables[PARAMS]
    parts = {
        PARAMS: {name: leaf for name, leaf in params.items() if name not in names},
        FROZEN: {name: leaf for name, leaf in params.items() if name in names},
    }
    return {**variables, **parts}


def train_adapters(
    model: Decoder, variables: dict[str, Any], heads: Collection[str] = ()
) -> tuple[Decoder, dict[str, Any], tuple[Any, ...]]:
    """(the model, variables, the collections that train). The adapters train, and with them `heads` and the matrices
    that train whole. Nothing trains below the first layer that has an adapter, and no gradient goes there, unless the
    embedding trains."""
    found = adapters(variables)
    heads = {*heads, *trained_whole(variables)}
    layer_paths = model.layer_paths()

    def adapts(layer: int) -> bool:
        block, repeat = layer_paths[layer]
        return any(path[:2] == block and np.asarray(fixed[SCALE])[repeat] for path, (_, fixed) in found.items())

    first = next((layer for layer in range(len(layer_paths)) if adapts(layer)), len(layer_paths))
    first = 0 if "token_embedding" in heads else first
    while first < len(layer_paths) and layer_paths[first][0][1] != "block_0":  # a pattern of layers cannot be cut
        first -= 1
    model, variables, below = cut(model, variables, len(layer_paths) - first)
    for name in (LORA, LORA_FIXED):
        variables[name] = {group: tree for group, tree in variables[name].items() if group not in below}
    if heads.isdisjoint(variables[PARAMS]):
        return model, variables, (LORA,)
    return model, freeze(variables, variables[PARAMS].keys() - heads), (PARAMS, LORA)
