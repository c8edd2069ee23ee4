"""How values of a device are read."""

from typing import Any

import jax


def to_host(tree: Any) -> Any:
    """The arrays of the tree as numpy arrays, copied once they are there. JAX's CPU backend aborts the process now and
    then if it is to copy an array for which no memory was found; to wait for it first raises the error."""
    return jax.device_get(jax.block_until_ready(tree))
