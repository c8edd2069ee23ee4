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

from llmq_jax.layers.axes import by_group, gathered_over_fsdp
from llmq_jax.objectives.chunks import Chunks, chunk_tokens

# Size of a chunk's logits, in elements. Every chunk reads and writes the whole gradient of the head: few chunks.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 2**25, 2**28
SHORTEST_CHUNK = 128

Unembed = Callable[[Any, Array], Array]


def token_losses(logits: Float[Array, "M V"], targets: Int[Array, " M"]) -> Float[Array, " M"]:
    """-log softmax(logits)[target] of M tokens, in nats. The chunked form takes both value and gradient from here, so
    that a term added here is trained too."""
    logits = logits.astype(jnp.float32)
    # By comparison, because the gradient of a lookup is a scatter into another array of this size.
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

    `unembed(head, rows)` gives the logits [M, V] of rows [M, D]; `head` holds the variables that it reads. Gradients
    flow to `hidden` and to those leaves of `head` that are differentiated. `chunk_size` is in tokens; None chooses it
    from V.
    """
    if chunk_size is None:
        vocabulary = jax.eval_shape(unembed, head, hidden.reshape(-1, hidden.shape[-1])).shape[-1]
        chunk_size = chunk_tokens(
            vocabulary, elements=CHUNK_ELEMENTS, on_gpu=GPU_CHUNK_ELEMENTS, shortest=SHORTEST_CHUNK
        )
    loss: Array = _summed_loss(unembed, chunk_size, gathered_over_fsdp(head), hidden, targets, mask)
    return loss


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(unembed: Unembed, chunk_size: int, head: Any, hidden: Array, targets: Array, mask: Array) -> Array:
    """The forward pass when nothing is differentiated: evaluation."""

    @by_group
    def loss(rows: Array, target: Array, weight: Array) -> Array:
        return jnp.sum(weight * token_losses(unembed(head, rows), target))

    def add(total: Array, *chunk: Array) -> tuple[Array, None]:
        return total + loss(*chunk), None

    def skip(total: Array, *_: Array) -> tuple[Array, None]:
        return total, None

    chunks = Chunks.of(mask, chunk_size)
    start = jnp.zeros(chunks.groups, jnp.float32)
    losses: Array = _over_chunks(add, skip, start, chunks, hidden, targets, mask)[0]
    return losses.sum()


def _forward(
    unembed: Unembed, chunk_size: int, head: Any, hidden: Any, targets: Any, mask: Any
) -> tuple[Array, tuple[Any, Array]]:
    # With symbolic_zeros each argument has a .value and .perturbed: whether it needs a gradient. A fixed head does not.
    learns, fixed = (_those(head, perturbed) for perturbed in (True, False))
    hidden, targets, mask = hidden.value, targets.value, mask.value

    @by_group
    def gradients(rows: Array, target: Array, weight: Array) -> tuple[Any, ...]:
        logits, pull_back = jax.vjp(lambda learns, rows: unembed(_joined(learns, fixed), rows), learns, rows)
        losses, pull_back_losses = jax.vjp(lambda logits: token_losses(logits, target), logits)
        return jnp.sum(weight * losses), *pull_back(*pull_back_losses(weight))

    def add(carry: tuple[Array, Any], *chunk: Array) -> tuple[tuple[Array, Any], Array]:
        total, head_gradient = carry
        loss, head_grad, row_grad = gradients(*chunk)
        return (total + loss, jax.tree.map(jnp.add, head_gradient, head_grad)), row_grad

    def skip(carry: tuple[Array, Any], rows: Array, *_: Array) -> tuple[tuple[Array, Any], Array]:
        return carry, jnp.zeros_like(rows)

    # Groups are summed once, after the loop, and not for every chunk. In float32, because there are many chunks.
    chunks = Chunks.of(mask, chunk_size)
    zeros = jax.tree.map(lambda leaf: jnp.zeros((chunks.groups, *leaf.shape), jnp.float32), learns)
    start = jnp.zeros(chunks.groups, jnp.float32), zeros
    (total, head_gradient), row_gradients = _over_chunks(add, skip, start, chunks, hidden, targets, mask)
    head_gradient = jax.tree.map(lambda total, leaf: total.sum(0).astype(leaf.dtype), head_gradient, learns)
    return total.sum(), (head_gradient, chunks.join(row_gradients))


def _backward(
    unembed: Unembed, chunk_size: int, gradients: tuple[Any, Array], grad: Array
) -> tuple[Any, Array, None, None]:
    head_gradient, hidden_gradient = jax.tree.map(lambda g: (g * grad).astype(g.dtype), gradients)
    return head_gradient, hidden_gradient, None, None


_summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_chunks(
    add: Callable[..., Any], skip: Callable[..., Any], start: Any, chunks: Chunks, *rows: Array
) -> tuple[Any, Any]:
    """(last carry, stacked results) of a scan over chunks: `add(carry, *rows)` for a chunk in which a token counts,
    `skip(carry, *rows)` for the others. `rows` are arrays [B, T, ...], of which the last is the mask."""
    parts = tuple(map(chunks.split, rows))
    any_counted = (parts[-1] != 0).any(axis=(1, 2))  # outside the loop: one exchange between devices for all chunks

    def body(carry: Any, chunk: tuple[Array, tuple[Array, ...]]) -> tuple[Any, Any]:
        result: tuple[Any, Any] = jax.lax.cond(chunk[0], add, skip, carry, *chunk[1])
        return result

    if chunks.chunks == 1:
        return jax.lax.scan(lambda carry, chunk: add(carry, *chunk), start, parts)
    return jax.lax.scan(body, start, (any_counted, parts))


def _those(head: Any, perturbed: bool) -> Any:
    """The values that need a gradient (or, with perturbed=False, those that do not), and None for the others."""
    return jax.tree.map(
        lambda leaf: leaf.value if leaf.perturbed == perturbed else None,
        head,
        is_leaf=lambda leaf: hasattr(leaf, "perturbed"),
    )


def _joined(first: Any, second: Any) -> Any:
    """One tree from two, each of which has None where the other has a value."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)
