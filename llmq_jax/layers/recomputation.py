"""What the backward pass computes again, instead of keeping it from the forward pass."""

from collections.abc import Callable

import jax


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same function, of which the backward pass keeps the arguments alone (`jax.checkpoint`).

    For what is cheap beside the writing and reading of its intermediate values. JAX keeps all that derivatives need,
    five arrays of a GELU: in a loop over layers (`scan_layers`) each is written to a stack and read from there, a tenth
    of the time of a GPT-2 step and two fifths of its memory. Of layers written out XLA sees both passes and keeps what
    it likes.
    """
    again: Callable[..., jax.Array] = jax.checkpoint(function, prevent_cse=False)  # which a loop's body does not need
    return again
