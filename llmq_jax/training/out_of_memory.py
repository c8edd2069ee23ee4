"""What to say when memory has run out: what could not be allocated, and what is on a device."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import axis_sizes, row_devices
from llmq_jax.training.sharding import row_share

SIGNS = re.compile(r"RESOURCE_EXHAUSTED|out[ _]of[ _]memory|bad_alloc", re.IGNORECASE)
"""How errors say it: XLA's status, which the CPU's runtime at times wraps in INTERNAL; the drivers; C++."""
ERRORS = (MemoryError, jax.errors.JaxRuntimeError)


class OutOfMemory(BadInput):
    """Memory has run out in training. The message tells what takes it, but not yet what to do about it."""


def shortage(error: BaseException) -> str | None:
    """One line of what the error says, if memory has run out."""
    if not isinstance(error, MemoryError) and not (isinstance(error, ERRORS) and SIGNS.search(str(error))):
        return None
    lines = str(error).strip().splitlines() or ["no memory is left for Python"]
    line = next((line for line in lines if SIGNS.search(line)), lines[0])
    # "INTERNAL: Error dispatching computation: Out of memory allocating 16 bytes."
    line = line.strip().split(": ")[-1].rstrip(".")[:200]
    return re.sub(r"(\d+) bytes", lambda found: size(int(found[1])), line)


def bytes_on_a_device(tree: Any) -> int:
    """Bytes on a device of all arrays of the tree, donated ones included."""

    def shard(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else np.shape(leaf)
        return int(math.prod(shape) * leaf.dtype.itemsize)

    return sum(shard(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def usage(state: Any, batch: Any, train_step: Callable[..., Any], *, compiled: bool = True) -> str:
    """What a step needs on each device, in words. `compiled`: whether the step could be compiled."""
    parameters, moments, gradients = (
        size(bytes_on_a_device(tree)) for tree in (state.variables, state.optimizer_state, state.trained)
    )
    whole = bytes_on_a_device(batch) * row_share()["process_count"]
    devices = row_devices(sizes) if (sizes := axis_sizes()) else getattr(train_step, "replicas", 1)
    rows = size(whole // devices)
    held = f"a device holds parameters of {parameters}, an optimizer state of {moments} and a batch of {rows}"
    temporary = temporary_bytes(state, batch, train_step) if compiled else None
    if temporary is None:
        return f"{held}; a step adds gradients of {gradients}, and activations"
    return f"{held}; a step adds {size(temporary)}, gradients of {gradients} among them"


def temporary_bytes(state: Any, batch: Any, train_step: Callable[..., Any]) -> int | None:
    """Bytes that the compiled step allocates beside its arguments; None where that cannot be told. JAX still has the
    program, which the failed step compiled."""
    try:
        step: Any = train_step
        return int(step.program.lower(state, step.divided(batch)).compile().memory_analysis().temp_size_in_bytes)
    except Exception:  # a step of another kind, or there is no memory for this either
        return None


def placed() -> str:
    """How much this process's arrays take on a device, in words."""
    return size(bytes_on_a_device(jax.live_arrays()))


def size(count: int) -> str:
    """1.5 GiB, 23.4 MiB, 12 bytes."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"
