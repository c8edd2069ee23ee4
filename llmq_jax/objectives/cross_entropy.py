"""Cross-entropy that never holds [B, T, V].

The logits of a language model are its largest array by far (2,048 tokens of a 128,256-word vocabulary in float32:
1 GB), and automatic differentiation keeps several of that size. Here the tokens go by in chunks. Each chunk's logits
give its loss and, while they are at hand, the gradients, so that nothing of size V outlives its chunk except the
gradient of the head itself: as fast as the plain form, in a fraction of its memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmq_jax.layers.axes import by_group, gathered_over_fsdp
from llmq_jax.objectives.chunks import Chunks

# Logits of a chunk, in elements: every chunk adds to the whole of the head's gradient, so there should be few of them.
CHUNK_ELEMENTS = 2**25

Unembed = Callable[[Any, Array], Array]


def token_losses(logits: Float[Array, "M V"], targets: Int[Array, " M"]) -> Float[Array, " M"]:
    """-log softmax(logits)[target] of M tokens, in nats. The chunked form takes value and gradient from here:
    what is added trains, too."""
    logits = logits.astype(jnp.float32)
    # By comparison: a lookup's gradient is a scatter into another array of this size.
    chosen = jnp.where(targets[:, None] == jnp.arange(logits.shape[-1]), logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def chunked_cross_entropy(
    unembed: Unembed,
    head: dict[str, Any],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of mask · (-log p(target)), in nats.

    `unembed(head, rows)` gives the logits [M, V] of rows [M, D]; `head` are the variables it reads. Gradients flow to
    `hidden` and to what of `head` is differentiated. `chunk_size` is in tokens; None chooses it from V.
    """
    if chunk_size is None:
        vocabulary = jax.eval_shape(unembed, head, hidden.reshape(-1, hidden.shape[-1])).shape[-1]
        chunk_size = max(128, CHUNK_ELEMENTS // vocabulary)
    chunks = Chunks.of(len(hidden), mask.size, chunk_size)
    split = (chunks.split(chunks.by_group(x)) for x in (hidden, targets, mask))
    loss: Array = _summed_loss(unembed, gathered_over_fsdp(head), *split)
    return loss


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(unembed: Unembed, head: Any, hidden: Array, targets: Array, mask: Array) -> Array:
    """The forward pass when nothing is differentiated: evaluation. Arrays are [chunks, groups, M, ...]."""

    @by_group
    def loss(rows: Array, target: Array, weight: Array) -> Array:
        return jnp.sum(weight * token_losses(unembed(head, rows), target))

    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        return total + loss(*chunk), None

    return jax.lax.scan(add, jnp.zeros(mask.shape[1], jnp.float32), (hidden, targets, mask))[0].sum()


def _forward(unembed: Unembed, head: Any, hidden: Any, targets: Any, mask: Any) -> tuple[Array, tuple[Any, Array]]:
    # Each comes as (value, whether a gradient is wanted): a head that stays as it is costs none.
    learns, fixed = (_those(head, perturbed) for perturbed in (True, False))
    hidden, targets, mask = hidden.value, targets.value, mask.value

    @by_group
    def gradients(rows: Array, target: Array, weight: Array) -> tuple[Any, ...]:
        logits, pull_back = jax.vjp(lambda learns, rows: unembed(_joined(learns, fixed), rows), learns, rows)
        losses, pull_back_losses = jax.vjp(lambda logits: token_losses(logits, target), logits)
        return jnp.sum(weight * losses), *pull_back(*pull_back_losses(weight))

    def add(carry: tuple[Array, Any], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Any], Array]:
        total, head_gradient = carry
        loss, head_grad, row_grad = gradients(*chunk)
        return (total + loss, jax.tree.map(jnp.add, head_gradient, head_grad)), row_grad

    # Groups add up at the end, once: in the loop they would do so for every chunk. In float32: chunks are many.
    groups = mask.shape[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros((groups, *leaf.shape), jnp.float32), learns)
    start = jnp.zeros(groups, jnp.float32), zeros
    (total, head_gradient), hidden_gradient = jax.lax.scan(add, start, (hidden, targets, mask))
    head_gradient = jax.tree.map(lambda total, leaf: total.sum(0).astype(leaf.dtype), head_gradient, learns)
    return total.sum(), (head_gradient, hidden_gradient)


def _those(head: Any, perturbed: bool) -> Any:
    """The values that a gradient is wanted of, or those of which none is, with None in the others' places."""
    return jax.tree.map(
        lambda leaf: leaf.value if leaf.perturbed == perturbed else None,
        head,
        is_leaf=lambda leaf: hasattr(leaf, "perturbed"),
    )


def _joined(first: Any, second: Any) -> Any:
    """A tree of two that have None where the other has a value."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def _backward(unembed: Unembed, gradients: tuple[Any, Array], grad: Array) -> tuple[Any, Array, None, None]:
    head_gradient, hidden_gradient = jax.tree.map(lambda g: (g * grad).astype(g.dtype), gradients)
    return head_gradient, hidden_gradient, None, None


_summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)
