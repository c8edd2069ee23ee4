"""Experts on a mesh: each device sorts its own tokens, and sends them to the devices that have their experts.

Written by hand with `jax.shard_map`: the compiler alone would sort the tokens of all devices on each device.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llmq_jax.layers.axes import AXES, EXPERT, EXPERTS, TENSOR, axis_sizes, in_use, partition_spec
from llmq_jax.layers.expert_dispatch import Exchange, choose, dispatch, slots_each
from llmq_jax.layers.expert_weights import WEIGHTS, Activation, ExpertWeights

# Adapters (A, B) of experts: each has the dimensions of its side of the matrix. The low rank is never divided.
_LOW_RANK = {
    "up_low_rank": (("expert", None, None), ("expert", None, None, "hidden")),
    "down_low_rank": (("expert", "hidden", None), ("expert", None, None)),
}


def dispatch_on_mesh(
    x: Float[Array, "M D"],
    ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    experts: ExpertWeights,
    activation: Activation,
    implementation: str = "auto",
    capacity_factor: float | None = None,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """`dispatch` on the current mesh, or without one. Results are equal on every mesh, except for what "capacity"
    drops: an expert's slots are a share of the tokens on the devices along the expert axis, not of the whole batch."""
    sizes = axis_sizes()
    count = len(experts.up)

    def slots(assignments: int) -> int | None:
        return None if capacity_factor is None else slots_each(capacity_factor, assignments, count)

    if not sizes or choose(implementation) == "dense":  # dense is products alone, which the compiler can divide
        return dispatch(x, ids, weights, experts, activation, implementation, slots(ids.size))
    rows = partition_spec(("rows",), x.shape[:1], sizes, names=("batch",))
    specs = ExpertWeights(**{name: _spec(name, getattr(experts, name), sizes) for name in WEIGHTS})
    by_expert, by_hidden = EXPERT in specs.up, TENSOR in specs.up  # whether expert and tensor parallelism divide them
    devices = sizes[EXPERT] if by_expert else 1

    def on_a_device(x: Array, ids: Array, weights: Array, experts: ExpertWeights) -> tuple[Array, Array]:
        exchange = None
        if by_expert:
            all_to_all = partial(jax.lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=0, tiled=True)
            exchange = Exchange(devices, all_to_all)
        if by_hidden and experts.down_bias is not None:
            # Every device along the tensor axis adds the bias, and psum below adds these up.
            experts = experts.replace(down_bias=experts.down_bias / sizes[TENSOR])
        room = slots(ids.size * devices)
        mixed, dropped = dispatch(x, ids, weights, experts, activation, implementation, room, exchange)
        mixed = jax.lax.psum(mixed, TENSOR) if by_hidden else mixed
        return mixed, jax.lax.psum(dropped, AXES["batch"])

    specs_in = (rows, rows, rows, specs)
    on_mesh = jax.shard_map(on_a_device, in_specs=specs_in, out_specs=(rows, PartitionSpec()), check_vma=False)
    mixed, dropped = on_mesh(x, ids, weights, experts)
    return mixed, dropped


def _spec(name: str, leaf: Any, sizes: Mapping[str, int]) -> Any:
    """The partition of weights that multiply tokens: gathered along "embed", which is divided only to save memory."""
    if leaf is None:
        return None
    if name in _LOW_RANK:
        pairs = zip(leaf, _LOW_RANK[name], strict=True)
        return tuple(partition_spec((), x.shape, sizes, names=dims) for x, dims in pairs)
    path = name if name.endswith("bias") else f"{name}_kernel"
    return partition_spec((), leaf.shape, sizes, names=in_use(EXPERTS[path]))
