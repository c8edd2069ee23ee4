"""Cross-entropy that never holds [B, T, V].

The logits of a language model are its largest array by far (2,048 tokens of a 128,256-word vocabulary in float32:
1 GB), and automatic differentiation keeps several of that size. Here tokens pass through the head in chunks. Each
chunk's logits give its loss and, in the same forward pass, its gradients, so that nothing of size V outlives its chunk
except the gradient of the head itself: as fast as the plain form, in a fraction of its memory. Chunks that hold only
tokens that do not count (prompts, padding) are skipped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmq_jax.layers.axes import gathered_over_fsdp
from llmq_jax.objectives.chunks import Chunks, at_targets, chunk_tokens, merged_trees, parted

# Size of a chunk's logits, in elements. Every chunk reads and writes the whole gradient of the head: few chunks.
CHUNK_ELEMENTS = {"cpu": 2**25, "gpu": 2**29, "tpu": 2**28}
SHORTEST_CHUNK = 128

Unembed = Callable[[Any, Array], Array]


def token_losses(logits: Float[Array, "M V"], targets: Int[Array, " M"]) -> Float[Array, " M"]:
    """-log softmax(logits)[target] of M tokens, in nats. The chunked form takes both value and gradient from here, so
    that a term added here is trained too."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - at_targets(logits, targets)


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

    `unembed(head, rows)` gives the logits [M, V] of rows [M, D]; `head` holds the variables that it reads. Gradients
    flow to `hidden` and to those leaves of `head` that are differentiated. `chunk_size` is in tokens; None chooses it
    from V.
    """
    if chunk_size is None:
        vocabulary = jax.eval_shape(unembed, head, hidden.reshape(-1, hidden.shape[-1])).shape[-1]
        chunk_size = chunk_tokens(vocabulary, elements=CHUNK_ELEMENTS, shortest=SHORTEST_CHUNK)
    loss: Array = _summed_loss(unembed, chunk_size, gathered_over_fsdp(head), hidden, targets, mask)
    return loss


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(unembed: Unembed, chunk_size: int, head: Any, hidden: Array, targets: Array, mask: Array) -> Array:
    """The forward pass when nothing is differentiated: evaluation."""

    def loss(rows: Array, target: Array, weight: Array) -> tuple[Array, None]:
        return jnp.sum(weight * token_losses(unembed(head, rows), target)), None

    total: Array = Chunks.of(mask, chunk_size).run(loss, hidden, targets, mask)[0]
    return total


def _forward(
    unembed: Unembed, chunk_size: int, head: Any, hidden: Any, targets: Any, mask: Any
) -> tuple[Array, tuple[Any, Array]]:
    learns, fixed = parted(head)
    hidden, targets, mask = hidden.value, targets.value, mask.value

    def gradients(rows: Array, target: Array, weight: Array) -> tuple[tuple[Array, Any], Array]:
        logits, pull_back = jax.vjp(lambda learns, rows: unembed(merged_trees(learns, fixed), rows), learns, rows)
        losses, pull_back_losses = jax.vjp(lambda logits: token_losses(logits, target), logits)
        head_gradient, row_gradient = pull_back(*pull_back_losses(weight))
        return (jnp.sum(weight * losses), head_gradient), row_gradient

    (total, head_gradient), row_gradients = Chunks.of(mask, chunk_size).run(gradients, hidden, targets, mask)
    head_gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), head_gradient, learns)
    return total, (head_gradient, row_gradients)


def _backward(
    unembed: Unembed, chunk_size: int, gradients: tuple[Any, Array], grad: Array
) -> tuple[Any, Array, None, None]:
    head_gradient, hidden_gradient = jax.tree.map(lambda g: (g * grad).astype(g.dtype), gradients)
    return head_gradient, hidden_gradient, None, None


_summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)
