"""Which devices hold which part of an array: one table for the parameters of every architecture, and for activations.

A mesh of devices has four axes; those not in use have one device:

    data      data parallelism: rows of the batch are divided, parameters are replicated
    fsdp      rows are divided, and each parameter is too; it is gathered where it is used (ZeRO stage 3: Rajbhandari
              et al. 2020, arXiv:1910.02054)
    expert    expert parallelism: rows are divided, and so are the experts; tokens are sent to the devices of their
              experts (Lepikhin et al. 2020, arXiv:2006.16668)
    tensor    tensor parallelism: the same rows for all; heads and hidden units of each layer are divided (Shoeybi et
              al. 2019, arXiv:1909.08053)

Dimensions have names (the "logical axes" of T5X and MaxText), and `AXES` says which mesh axes divide a name. The names
of a parameter's dimensions depend on the module that holds it, never on its rank. Models name the dimensions of
activations (`constrain`) and know no mesh axes; without a mesh (`jax.set_mesh`) names do nothing.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llmq_jax.errors import BadInput

DATA, FSDP, EXPERT, TENSOR = "data", "fsdp", "expert", "tensor"
MESH_AXES = (DATA, FSDP, EXPERT, TENSOR)

AXES = {
    "batch": (DATA, FSDP, EXPERT),
    "embed": (FSDP,),  # of parameters; activations have all of it
    "latent": (FSDP,),
    "heads": (TENSOR,),
    "hidden": (TENSOR,),
    "vocabulary": (TENSOR,),
    "expert": (EXPERT,),
}

# The dimensions of a kernel or an embedding, by the module that holds it; a bias has all but the first. "parts" is the
# axis along which several matrices are stored as one array, for speed.
MODULES = {
    "token_embedding": ("vocabulary", "embed"),
    "position_embedding": (None, "embed"),
    "qkv": ("embed", "parts", "heads", None),
    "query": ("embed", "heads", None),
    "key": ("embed", "heads", None),
    "value": ("embed", "heads", None),
    "query_down": ("embed", None),
    "query_up": ("latent", "heads", None),
    "latent_down": ("embed", None),
    "latent_up": ("latent", "heads", None),
    "out": ("heads", "embed"),
    "gate": ("embed", "hidden"),
    "up": ("embed", "hidden"),
    "down": ("hidden", "embed"),
    "router": ("embed", None),
    "noise": ("embed", None),
    "projection": (None, "embed"),
    "lm_head": ("embed", "vocabulary"),
    "score": ("embed", None),
}
# The dimensions of parameters that are stacked over experts, by the parameter's own name.
EXPERTS = {
    "up_kernel": ("expert", "embed", "parts", "hidden"),
    "up_bias": ("expert", "parts", "hidden"),
    "down_kernel": ("expert", "hidden", "embed"),
    "down_bias": ("expert", None),
}


def dimensions(path: Sequence[str]) -> tuple[str | None, ...]:
    """The names of a parameter's dimensions, without leading stack axes; () for what is replicated on every device:
    norms, adapters and other small parameters. BadInput for the path of a matrix that no table lists."""
    module, name = ("", *path)[-2:]
    if name in EXPERTS:
        return EXPERTS[name]
    if name in ("kernel", "embedding"):
        if module not in MODULES:
            raise BadInput(f"{'/'.join(path)} has no named dimensions; give {module!r} some in {__name__}.MODULES")
        return MODULES[module]
    return MODULES[module][1:] if name == "bias" and module in MODULES else ()


def partition_spec(
    path: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int], names: Sequence[str | None] | None = None
) -> PartitionSpec:
    """How the axes of a mesh, with these sizes, divide a parameter, or an array whose last dimensions have these
    `names`. A dimension that its axes do not divide evenly stays whole."""
    names = dimensions(path) if names is None else names
    stacked = len(shape) - len(names)
    if stacked < 0:  # optimizer state with fewer dimensions than its parameter
        return PartitionSpec()
    axes = [*(None,) * stacked, *(_axes_of(name, n, sizes) for name, n in zip(names, shape[stacked:], strict=True))]
    while axes and axes[-1] is None:  # the compiler's own form: its outputs, fed back, compile no second program
        axes.pop()
    return PartitionSpec(*axes)


def _axes_of(name: str | None, size: int, sizes: Mapping[str, int]) -> Any:
    axes = tuple(axis for axis in AXES.get(name or "", ()) if sizes.get(axis, 1) > 1)
    if not axes or size % math.prod(sizes[axis] for axis in axes):
        return None
    return axes if len(axes) > 1 else axes[0]


def axis_sizes() -> dict[str, int]:
    """Number of devices along each axis of the current mesh; {} without one, and inside `jax.pmap`, whose axis is not
    one of ours."""
    return {name: size for name, size in jax.sharding.get_abstract_mesh().shape.items() if name in MESH_AXES}


def target_device() -> Any:
    """A device of the kind that a program being traced is for: of the current mesh, whose devices may be described and
    not be here (`training/compiled_plan.py`), or else the first that JAX has."""
    here, described = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
    return here if described is None or described.platform == here.platform else described


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": the kind of `target_device`."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if described is None else described.platform


def _constrained(x: Array, spec: PartitionSpec) -> Array:
    constrained: Array = jax.lax.with_sharding_constraint(x, spec)
    return constrained


def constrain(x: Array, *names: str | None) -> Array:
    """A sharding constraint on an activation whose dimensions have these names: `AXES` says how they are divided.
    Trailing names may be left out."""
    sizes = axis_sizes()
    if not sizes:
        return x
    spec = PartitionSpec(*(_axes_of(name, size, sizes) for name, size in zip(names, x.shape, strict=False)))
    return _constrained(x, spec)


def row_devices(sizes: Mapping[str, int]) -> int:
    """How many parts a mesh with axes of these sizes divides a batch into."""
    return math.prod(sizes[axis] for axis in AXES["batch"])


def row_groups(rows: int) -> int:
    """Into how many equal parts the current mesh divides this many rows of a batch: 1 without a mesh, or where the rows
    cannot be divided evenly."""
    sizes = axis_sizes()
    groups = row_devices(sizes) if sizes else 1
    return groups if rows % groups == 0 else 1


def by_group(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` applied to each group separately, on arrays with a leading axis of `row_groups`: sums over rows stay
    separate, on the devices that hold these rows. A single group skips the vmap."""

    def apply(*arrays: Any) -> Any:
        if len(jax.tree.leaves(arrays)[0]) > 1:
            return jax.vmap(function)(*arrays)
        alone = function(*jax.tree.map(lambda x: x[0], arrays))
        return jax.tree.map(lambda x: x[None], alone)

    return apply


def constrain_like_params(tree: Any) -> Any:
    """A sharding constraint on a tree of parameters, or of arrays with their shapes, such as an optimizer's moments:
    each leaf is divided as its parameter is."""
    sizes = axis_sizes()
    if not sizes:
        return tree

    def place(path: tuple[Any, ...], leaf: Array) -> Array:
        return _constrained(leaf, partition_spec(path_names(path), leaf.shape, sizes))

    return jax.tree_util.tree_map_with_path(place, tree)


def in_use(names: Sequence[str | None]) -> tuple[str | None, ...]:
    """The dimensions of a parameter that stay divided when it multiplies activations; those divided over fsdp alone,
    only to save memory, become None."""
    return tuple(None if AXES.get(name or "") == (FSDP,) else name for name in names)


def gathered_over_fsdp(tree: Any) -> Any:
    """Parameters gathered over fsdp, as products need them: once, before a loop. Their gradients are constrained to the
    parameters' own sharding, so that the sum over devices can be a reduce-scatter."""
    sizes = axis_sizes()
    if not sizes:
        return tree

    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        names = dimensions(path_names(path))
        used, kept = (partition_spec((), leaf.shape, sizes, names=each) for each in (in_use(names), names))

        @jax.custom_vjp
        def gathered(x: Array) -> Array:
            return _constrained(x, used)

        gathered.defvjp(lambda x: (gathered(x), None), lambda _, g: (_constrained(g, kept),))
        return gathered(leaf)

    return jax.tree_util.tree_map_with_path(gather, tree)


def looked_up(
    vectors: Callable[[Array, Array], Array], table: Float[Array, "V D"], ids: Int[Array, "..."], rows: str | None
) -> Float[Array, "... D"]:
    """`vectors(table, ids)`, which looks ids up in a table whose rows have the name `rows`.

    Where a device has fewer ids than the table has rows, the table stays divided by fsdp: each device looks up its
    columns for all ids along fsdp, and an all-to-all makes whole vectors of them, and columns of their gradients.
    Otherwise the table is gathered, which then has fewer bytes than the vectors.
    """
    sizes = axis_sizes()
    groups = row_groups(len(ids)) if ids.ndim else 1
    if _axes_of("embed", table.shape[1], sizes) is None or ids.size // groups >= len(table):
        return vectors(constrain(table, rows), ids)
    # A dimension of its own for each axis, so that fsdp alone moves: from columns to rows of the batch.
    axes = [axis if groups > 1 else None for axis in AXES["batch"]]
    each = ids.reshape(*(sizes[axis] if axis else 1 for axis in axes), -1, *ids.shape[1:])
    along = [None if axis == FSDP else axis for axis in axes]
    each = _constrained(each, PartitionSpec(*along))
    columns = _constrained(vectors(table, each), PartitionSpec(*along, *[None] * ids.ndim, FSDP))
    return _constrained(columns, PartitionSpec(*axes)).reshape(*ids.shape, table.shape[1])


def sharding_of(path: Sequence[str], leaf: Any) -> NamedSharding:
    """The sharding of a parameter, or of its shape, on the current mesh."""
    mesh = jax.sharding.get_mesh()
    return NamedSharding(mesh, partition_spec(path, leaf.shape, dict(mesh.shape)))


def put(path: Sequence[str], leaf: Any) -> Array:
    """A parameter on its devices: with a mesh, each part goes directly to the devices that hold it. Several processes
    each pass the same whole array (see `noted`), or all pass one global array."""
    sharding = sharding_of(path, leaf) if axis_sizes() else None
    there: Array
    if jax.process_count() == 1 or sharding is None or (isinstance(leaf, Array) and not leaf.is_fully_addressable):
        there = jax.device_put(leaf, sharding)
    else:
        whole = np.asarray(leaf)
        if _digests:
            note(f"{'/'.join(path)} {whole.dtype} {whole.shape}".encode(), whole.reshape(-1).view(np.uint8))
        there = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return there


_digests: list[Any] = []


@contextlib.contextmanager
def noted() -> Iterator[Any]:
    """A SHA-256 of all that `put` takes meanwhile from copies of this process's own, by which processes can tell that
    theirs are the same."""
    _digests.append(hashlib.sha256())
    try:
        yield _digests[-1]
    finally:
        _digests.pop()


def note(*what: Any) -> None:
    """Add bytes to the digest under way, if there is one."""
    for digest in _digests[-1:]:
        for part in what:
            digest.update(part)


def on_host(x: Array | np.ndarray) -> np.ndarray:
    """The whole array on the host, even if other processes hold parts of it; then all of them must call this."""
    return np.asarray(x if getattr(x, "is_fully_addressable", True) else jax.jit(replicated)(x))


def replicated(tree: Any) -> Any:
    """A tree of small arrays, replicated on every device of the mesh: any process can read them."""
    if not axis_sizes():
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path of jax.tree_util as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def is_stacked(name: str) -> bool:
    """Whether the part of a collection with this name is a group of layers, whose arrays are stacked."""
    return name.startswith("group_")
