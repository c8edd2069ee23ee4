"""Whether a training step fits a TPU slice, asked of the compiler itself, on a computer without a TPU.

libtpu has the compiler of its TPUs, and describes the slices that there are (`jax.experimental.topologies`). Under a
mesh of such devices a step is traced as it would be there (`layers.axes.target_device`), attention's kernel included,
lowered and compiled, but not run. Nothing has weights.
"""

import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from llmq_jax.backend import not_kept
from llmq_jax.errors import BadInput, first_line
from llmq_jax.layers.axes import AXES, path_names, sharding_of
from llmq_jax.training.plan import Run, abstract_step, check

ALONE = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here takes hold of a TPU
}
"""Variables without which libtpu complains that it finds no TPU here, or that another process uses one. The kind that
it is told has no effect on what is compiled."""


class Memory(NamedTuple):
    """Bytes that a compiled step takes on a device."""

    held: int
    """Its arguments: parameters, the optimizer's moments, the batch."""
    beside: int
    """What the program allocates beside them, gradients included."""


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, from a name such as "v5e:4x4" or "v5p:2x2x4". BadInput: libtpu is not installed, or
    knows no such slice."""
    if find_spec("libtpu") is None:
        raise BadInput("to compile for a TPU takes its compiler; pip install -e '.[tpu]'")
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu").devices)
    except Exception as error:  # of several kinds, by what is wrong with the name
        raise BadInput(
            f"there is no TPU slice {name!r}: {first_line(error)[:200]}; write v5e:4x4, v5p:2x2x4 or v6e:2x4"
        ) from None


def compile_step(run: Run) -> Memory:
    """Compile the step for the devices of the current mesh. BadInput for a mesh or a batch that cannot be; the compiler
    of a TPU raises a `JaxRuntimeError` where the step does not fit (`out_of_memory.shortage`)."""
    check(run)
    step, state, batch = abstract_step(run)
    rows = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(AXES["batch"]))
    places = jax.tree_util.tree_map_with_path(lambda path, leaf: sharding_of(path_names(path), leaf), state)
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (state, batch),
        (places, dict.fromkeys(batch, rows)),
    )
    with not_kept():
        found = step.lower(*placed).compile().memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes  # which do not take the place of arguments
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes + results)
