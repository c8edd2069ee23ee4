"""What the backward pass of a layer recomputes, instead of keeping it from the forward pass (`jax.checkpoint`)."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# Elementwise operations, and lookups: cheaper to repeat than to write their results and read them back. `exp` is not
# among them, because attention takes it of T x T scores; nor are sums; and a comparison's result is small. What a
# hand-written forward rule calls as a `custom_vjp` function is repeated too (`lora.raised`).
CHEAP = frozenset(
    (
        *("add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "cos"),
        *("custom_vjp_call", "div", "erf", "expand_dims", "gather", "integer_pow", "logistic", "max", "min", "mul"),
        *("neg", "one_minus_square", "pad", "reshape", "rev", "rsqrt", "select_n", "sign", "sin", "slice", "split"),
        *("sqrt", "square", "squeeze", "sub", "tanh", "transpose"),
    )
)


def but_cheap(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep all but the results of cheap operations."""
    return primitive.name not in CHEAP


POLICIES = {
    "none": but_cheap,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the forward pass keeps for a pattern's backward pass: all that is not cheap, the results of products with
weights, or the input alone."""


def kept(results: Any) -> Any:
    """Results that a hand-written gradient reads, so marked that "none" keeps these very arrays.

    Of a loop's results `jax.checkpoint` would otherwise keep what each iteration computes, or repeat the loop; of a
    cheap operation's, its operands.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "kept"), results)
