"""Training and generation on many devices: the mesh, and how arrays are placed on it.

    with jax.set_mesh(make_mesh("data=2,tensor=4")):
        state = create_state(init(config), optimizer)       made in parts, each on its own device
        state, metrics = train_step(state, place_batch(batch))

`layers.axes` says which mesh axes divide which dimensions. The compiler does the rest: it divides the products and
inserts the exchanges between devices (axes are of type Auto: with Explicit ones Linen's modules cannot run).
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmq_jax.counts import counted
from llmq_jax.data.windows import rows_of
from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.layers.axes import (
    AXES,
    MESH_AXES,
    axis_sizes,
    dimensions,
    noted,
    partition_spec,
    path_names,
    put,
    row_devices,
)
from llmq_jax.training.processes import share, together

OTHER_NAMES = {"dp": "data", "tp": "tensor", "model": "tensor", "ep": "expert"}
"""{axis as others call it: as it is called here}"""


def mesh_sizes(text: str) -> dict[str, int]:
    """Number of devices along each axis, from a text like "data=2,fsdp=4"; 1 along axes that it leaves out."""
    if not isinstance(text, str):
        raise BadInput(f"mesh {text!r:.60} must be a text, as data=2,fsdp=4")
    sizes = dict.fromkeys(MESH_AXES, 1)
    given = set()
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise BadInput(f"mesh {text!r}: {part.strip()!r} is no axis with its size; write data=2,fsdp=4")
        if name not in sizes:
            meant = f"here it is {OTHER_NAMES[name]}" if name in OTHER_NAMES else did_you_mean(name, MESH_AXES)
            raise BadInput(f"mesh {text!r}: unknown axis {name!r}: {meant}")
        if name in given:
            raise BadInput(f"mesh {text!r}: {name} is there twice")
        if not size.isdecimal() or int(size) < 1:
            raise BadInput(f"mesh {text!r}: {part.strip()!r} is no size; write {name}=2")
        given.add(name)
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a text like "data=2,fsdp=4" describes, of the given devices or of all.

    BadInput: an axis that is unknown or there twice, or sizes that do not multiply to the number of devices.
    """
    sizes = mesh_sizes(text)
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(sizes.values())
    if wanted != len(devices):
        factors = [str(size) for size in sizes.values() if size > 1]
        product = f"{' x '.join(factors)} = {wanted}" if len(factors) > 1 else wanted
        virtual = (
            f"; to try it on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
            if wanted > len(devices) and devices[0].platform == "cpu"
            else ""
        )
        raise BadInput(
            f"mesh {text!r} is for {product} devices, and JAX has {len(devices)}; sizes multiply to the "
            f"number of devices{virtual}"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=auto, devices=devices)


def check_mesh(sizes: Mapping[str, int], variables: dict[str, Any]) -> None:
    """BadInput where an axis divides no parameter: its devices would all compute the same."""
    leaves = [(path_names(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)]
    for axis in ("fsdp", "expert", "tensor"):
        if sizes[axis] == 1 or any(axis in jax.tree.leaves(tuple(partition_spec(*leaf, sizes))) for leaf in leaves):
            continue
        names = [name for name, axes in AXES.items() if axis in axes and name != "batch"]
        for path, shape in leaves:
            for name, size in zip(reversed(dimensions(path)), reversed(shape), strict=False):
                if name in names:
                    raise BadInput(
                        f"mesh axis {axis}={sizes[axis]} divides no parameter: {'/'.join(path)} {list(shape)} has "
                        f"{size} along {name!r}; choose a divisor"
                    )
        nothing = " or ".join(map(repr, names))
        raise BadInput(
            f"mesh axis {axis}={sizes[axis]} has no effect: this model has nothing along {nothing}; leave it out"
        )


def place(tree: Any) -> Any:
    """The tree with its arrays divided over the current mesh; unchanged without a mesh, and while a function is traced,
    which has no arrays to place."""
    if not _can_place(tree):
        return tree
    return jax.tree_util.tree_map_with_path(lambda path, leaf: put(path_names(path), leaf), tree)


def _can_place(tree: Any) -> bool:
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
    return not traced and bool(axis_sizes())


def spans_processes() -> bool:
    """Whether the current mesh has devices of several processes."""
    return bool(axis_sizes()) and jax.process_count() > 1 and jax.sharding.get_mesh().is_multi_process


@contextlib.contextmanager
def copies_compared(name: str) -> Iterator[None]:
    """In the end, where the current mesh spans processes, BadInput on all of them if one could not read, or has read
    other weights than process 0, or a checkpoint with other files: replicas would differ without a word. `name` says
    what was read."""
    if not spans_processes():
        yield
        return
    fault = None
    with noted() as digest:
        try:
            yield
        except BadInput as error:
            fault = error
    theirs, own = share(digest.hexdigest()), digest.hexdigest()

    def compare() -> None:
        if fault is not None:
            raise fault
        if own != theirs:
            raise BadInput(f"{name} is not the same here as where process 0 is; give all processes the same files")

    together(compare)


def place_batch(batch: dict[str, Any], parts: int | None = None) -> dict[str, Any]:
    """A batch with its rows divided over the current mesh; unchanged without a mesh. `parts` is the number of
    micro-batches, each of which must be divisible too (BadInput); if it is None, rows that cannot be divided go to all
    devices. With several processes, each passes its `own_rows` of the batch."""
    if not _can_place(batch):
        return batch
    mesh = jax.sharding.get_mesh()
    devices = row_devices(mesh.shape)
    shares = row_share()["process_count"]

    def put_rows(array: Any) -> Any:
        rows = len(array) * shares
        if parts is not None:
            check_rows(rows, parts, mesh.shape)
        spec = PartitionSpec(AXES["batch"]) if rows % devices == 0 else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        if shares == 1:  # device_put would compare the array among processes, by an exchange for each
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        return jax.make_array_from_process_local_data(sharding, np.asarray(array), (rows, *array.shape[1:]))

    return {name: put_rows(array) for name, array in batch.items()}


def row_share() -> dict[str, int]:
    """Which part of a batch's rows this process makes, on the current mesh: `process_index` of `process_count` equal
    parts. Processes whose devices differ only along axes that do not divide rows make the same rows."""
    if jax.process_count() == 1 or not axis_sizes():
        return {"process_index": 0, "process_count": 1}
    index, count = _row_share(jax.sharding.get_mesh())
    return {"process_index": index, "process_count": count}


@functools.cache
def _row_share(mesh: Mesh) -> tuple[int, int]:
    devices = row_devices(mesh.shape)
    rows: Mapping[Any, Any] = NamedSharding(mesh, PartitionSpec(AXES["batch"])).devices_indices_map((devices,))
    own = [rows[device][0].indices(devices)[0] for device in rows if device.process_index == jax.process_index()]
    held = max(own) - min(own) + 1
    if held != len(set(own)) or devices % held or min(own) % held:
        raise BadInput(
            f"a process's {jax.local_device_count()} devices have rows apart on mesh {dict(mesh.shape)}; choose sizes "
            "that keep them together"
        )
    return min(own) // held, devices // held


def own_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """This process's rows, by `row_share`, of a batch that every process has whole."""
    share = row_share()

    def part(array: Any) -> Any:
        rows = rows_of(**share, batch_size=len(array))
        return array[rows.start : rows.stop]

    return {name: part(array) for name, array in batch.items()}


def check_rows(rows: int, parts: int, sizes: Mapping[str, int]) -> None:
    """BadInput where a batch, or each of its `parts`, cannot be divided among devices."""
    devices = row_devices(sizes)
    if rows % (parts * devices):
        each = "" if parts == 1 else f" in {parts} parts"
        product = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES["batch"] if sizes[axis] > 1)
        among = f" among {devices} devices ({product})" if devices > 1 else ""
        raise BadInput(
            f"a batch of {counted(rows, 'row')}{each} cannot be divided{among}; choose a multiple of {parts * devices}"
        )


@dataclass(frozen=True)
class Layout:
    """How a parameter is divided over a mesh."""

    name: str
    shape: tuple[int, ...]
    axes: str
    """For each dimension the axes that divide it, or a dot if none does."""
    bytes_per_device: int


def layout(variables: dict[str, Any], sizes: Mapping[str, int]) -> list[Layout]:
    """The layout of each parameter in a tree of arrays or shapes, on a mesh of these sizes."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        spec = partition_spec(path_names(path), leaf.shape, dict(sizes))
        whole = (None,) * (len(leaf.shape) - len(spec))
        axes = [() if part is None else (part,) if isinstance(part, str) else part for part in (*spec, *whole)]
        devices = math.prod(sizes[axis] for part in axes for axis in part)
        shown = " ".join("+".join(part) or "." for part in axes)
        rows.append(Layout("/".join(path_names(path)), leaf.shape, shown, leaf.size * leaf.dtype.itemsize // devices))
    return rows


def layout_text(variables: dict[str, Any], sizes: Mapping[str, int]) -> str:
    """A table of `layout`, with totals."""
    rows = layout(variables, sizes)
    names = max(len(row.name) for row in rows)
    shapes = max(len(str(list(row.shape))) for row in rows)
    axes = max(len(row.axes) for row in rows)
    lines = [f"{'parameter':{names}}  {'shape':{shapes}}  {'axes':{axes}}  bytes per device"]
    for row in rows:
        lines.append(f"{row.name:{names}}  {list(row.shape)!s:{shapes}}  {row.axes:{axes}}  {row.bytes_per_device:16,}")
    devices, total = math.prod(sizes.values()), sum(row.bytes_per_device for row in rows)
    lines.append(f"{counted(devices, 'device')}, {total:,} bytes of parameters on each")
    return "\n".join(lines)
