"""Functions that the backward pass recomputes, instead of keeping their intermediate values from the forward pass."""

from collections.abc import Callable

import jax


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same function, for which the backward pass keeps only the arguments (`jax.checkpoint`).

    For functions that are cheaper than writing and reading their intermediate values. JAX keeps all that derivatives
    need, five arrays for a GELU: in a loop over layers (`scan_layers`) each is written to a stack and read back, which
    is a tenth of the time of a GPT-2 step and two fifths of its memory. In unrolled layers XLA sees both passes and
    decides itself what to keep.
    """
    again: Callable[..., jax.Array] = jax.checkpoint(function, prevent_cse=False)  # a loop's body needs no barrier
    return again
