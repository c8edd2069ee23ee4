"""Log-probabilities of given tokens, log p(token | tokens before it), on which preference and reinforcement learning
build, without ever forming logits [B, T, V].

Tokens pass through the head in chunks, which leave one number per token; the backward pass recomputes a chunk's logits.
Chunks that hold only tokens that do not count (prompts, padding) are skipped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.errors import BadInput
from llmq_jax.field_types import require_module, require_variables
from llmq_jax.layers.axes import gathered_over_fsdp
from llmq_jax.models.decoder import Decoder, Output, segments_of
from llmq_jax.objectives.chunks import Chunks, at_targets, chunk_tokens, merged_trees, parted

# Elements of a chunk's logits. Smaller chunks skip more tokens that do not count, but each chunk reads and writes the
# head's gradient.
CHUNK_ELEMENTS = {"cpu": 2**24, "gpu": 2**28, "tpu": 2**27}
SHORTEST_CHUNK = 64

Measure = Callable[[Float[Array, "N V"], Int[Array, " N"]], Float[Array, " N"]]


def token_logprobs(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    mask: Float[Array, "B T"] | Bool[Array, "B T"] | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    temperature: float = 1.0,
) -> Float[Array, "B T-1"]:
    """log p(token t+1 | tokens up to t) in nats, for t = 0 ... T-2, times the mask of token t+1 (None: all count).

    Rows are padded on the right to `lengths`. `temperature` divides the logits, as when the tokens were sampled.
    Gradients flow to `variables`. No [B, T, V] is ever held. BadInput: tokens or a mask of another shape.
    """
    return logprobs_and_counts(model, variables, tokens, mask, lengths=lengths, temperature=temperature)[0]


def sequence_logprobs(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    mask: Float[Array, "B T"] | Bool[Array, "B T"] | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """log p(response | prompt) in nats: the sum of the log-probabilities of the tokens in the mask, those of the
    response and its end token [B, T] (None: of all tokens but the first). Arguments as in `token_logprobs`."""
    return token_logprobs(model, variables, tokens, mask, lengths=lengths).sum(axis=-1)


def logprobs_and_counts(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    mask: Float[Array, "B T"] | Bool[Array, "B T"] | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Array, "B T-1"], dict[str, Any]]:
    """`token_logprobs`, and the counts of the pass, from which balance losses of experts are computed."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2:
        raise BadInput(f"tokens have the shape {list(tokens.shape)} and must be [B, T]; write [tokens] for one row")
    if mask is not None and jnp.shape(mask) != tokens.shape:
        raise BadInput(
            f"mask has the shape {list(jnp.shape(mask))} and tokens {list(tokens.shape)}; give it an entry for each "
            "token, the first too"
        )
    output = _forward(model, variables, tokens, lengths)
    counted = jnp.ones(tokens.shape) if mask is None else jnp.asarray(mask, jnp.float32)
    if lengths is not None:
        counted *= segments_of(lengths, tokens.shape[1])
    rows = output.hidden[:, :-1], tokens[:, 1:], counted[:, 1:]
    (logprobs,) = _measured(model, variables, *rows, temperature, (at_targets,))
    return logprobs, output.counts


def completion_logprobs(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    prompt_lengths: Int[Array, " B"],
    count: int,
    *,
    temperature: float = 1.0,
    entropies: bool = True,
    prompts: Int[Array, "B W"] | None = None,
    group_size: int = 1,
) -> tuple[Any, ...]:
    """(log-probability [B, C], entropy of the prediction [B, C] if asked for, counts) of the `count` tokens from each
    row's `prompt_lengths` on.

    Rows hold a prompt and its completion, `lengths` tokens in all, padded on the right; beyond them both results are 0.

    `prompts`: the rows' prompts, where `group_size` neighbouring rows have the same one; what follows a prompt in its
    row is ignored. Each is then read once for its group, forward and backward, and the result is the same (Liu et al.
    2025, Prefix Grouper, arXiv:2506.05433). Counts are then those of the completions.
    """
    places = prompt_lengths[:, None] + jnp.arange(count)
    counted = (places < lengths[:, None]).astype(jnp.float32)
    places = jnp.minimum(places, tokens.shape[1] - 1)
    if prompts is None:
        output = _forward(model, variables, tokens, lengths)
        hidden = jnp.take_along_axis(output.hidden, places[..., None] - 1, axis=1)
    else:
        before = jnp.take_along_axis(tokens, places - 1, axis=1)
        output = _after_prompts(model, variables, prompts, prompt_lengths, before, counted, group_size)
        hidden = output.hidden
    targets = jnp.take_along_axis(tokens, places, axis=1)
    measures = (at_targets, _entropy) if entropies else (at_targets,)
    return *_measured(model, variables, hidden, targets, counted, temperature, measures), output.counts


def _after_prompts(
    model: Decoder,
    variables: dict[str, Any],
    prompts: Int[Array, "B W"],
    prompt_lengths: Int[Array, " B"],
    tokens: Int[Array, "B C"],
    counted: Float[Array, "B C"],
    group_size: int,
) -> Output:
    """A pass over `tokens`, of which the first is the last token of its prompt. The prompt's other tokens are read
    before, once for each group, into caches."""
    (first, width), count = prompts[::group_size].shape, tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width), (first, width))
    lengths = prompt_lengths[::group_size] - 1
    caches = model.create_caches(first, width + count, model.compute_dtype(variables))
    read = model.apply(variables, prompts[::group_size], positions, caches=caches, lengths=lengths, method="forward")
    caches = jax.tree.map(lambda leaf: jnp.repeat(leaf, group_size, axis=1), read.caches)  # [layers, rows, ...]
    positions = prompt_lengths[:, None] - 1 + jnp.arange(count)
    output: Output = model.apply(variables, tokens, positions, counted.astype(jnp.int32), caches, method="forward")
    return output


def greedy_logprobs(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rows: Int[Array, " N"],
    targets: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
) -> tuple[Float[Array, "N T"], Bool[Array, "N T"]]:
    """(log p(target | tokens up to its place), whether it is the likeliest token, or the first of equally likely ones)
    for the targets in the mask; elsewhere 0 and False.

    `rows` says which row of `tokens` each row of targets belongs to: several may share one, which is read once. Tokens
    are padded on the right to `lengths`.
    """
    hidden = _forward(model, variables, tokens, lengths).hidden[rows]
    measures = (at_targets, _is_likeliest)
    logprobs, greedy = _measured(model, variables, hidden, targets, mask.astype(jnp.float32), 1.0, measures)
    return logprobs, greedy > 0


def _forward(model: Decoder, variables: dict[str, Any], tokens: Array, lengths: Array | None) -> Any:
    require_module(model)
    require_variables(variables)
    return model.apply(variables, tokens, lengths=lengths, method="forward")


def _measured(
    model: Decoder,
    variables: dict[str, Any],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    temperature: float,
    measures: tuple[Measure, ...],
) -> tuple[Float[Array, "B T"], ...]:
    """Each measure of the predicted log-probabilities and the target, at every token, times the mask."""
    chunk_size = chunk_tokens(model.config.vocab_size, elements=CHUNK_ELEMENTS, shortest=SHORTEST_CHUNK)

    def of_rows(head: dict[str, Any], rows: Array, target: Array) -> tuple[Array, ...]:
        logits = model.apply(head, rows, method="unembed") / temperature
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        return tuple(measure(logprobs, target) for measure in measures)

    head = gathered_over_fsdp(model.head_variables(variables))
    return tuple(values * mask for values in _in_chunks(of_rows, chunk_size, head, hidden, targets, mask))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    of_rows: Callable[..., tuple[Array, ...]], chunk_size: int, head: Any, hidden: Array, targets: Array, mask: Array
) -> tuple[Float[Array, "B T"], ...]:
    """`of_rows(head, rows, targets)` of all tokens; 0 in chunks in which none counts."""
    values: tuple[Array, ...] = Chunks.of(mask, chunk_size).run(
        lambda rows, target: (None, of_rows(head, rows, target)), hidden, targets
    )[1]
    return values


def _chunks_forward(
    of_rows: Callable[..., tuple[Array, ...]], chunk_size: int, head: Any, hidden: Any, targets: Any, mask: Any
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    learns, fixed = parted(head)
    rows = hidden.value, targets.value, mask.value
    return _in_chunks(of_rows, chunk_size, merged_trees(learns, fixed), *rows), (learns, fixed, *rows)


def _chunks_backward(
    of_rows: Callable[..., tuple[Array, ...]], chunk_size: int, saved: tuple[Any, ...], grads: tuple[Any, ...]
) -> tuple[Any, Array, None, None]:
    """No logits were kept: each chunk computes its own anew. Measures that nothing learns from, as an entropy that is
    only reported, are not differentiated."""
    learns, fixed, hidden, targets, mask = saved
    learned = [place for place, grad in enumerate(grads) if not isinstance(grad, SymbolicZero)]

    def gradients(rows: Array, target: Array, *grads: Array) -> tuple[Any, Array]:
        def measured(learns: Any, rows: Array) -> tuple[Array, ...]:
            values = of_rows(merged_trees(learns, fixed), rows, target)
            return tuple(values[place] for place in learned)

        pulled: tuple[Any, Array] = jax.vjp(measured, learns, rows)[1](grads)
        return pulled

    learned_grads = (grads[place] for place in learned)
    head_gradient, row_gradients = Chunks.of(mask, chunk_size).run(gradients, hidden, targets, *learned_grads)
    head_gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), head_gradient, learns)
    return head_gradient, row_gradients, None, None


_in_chunks.defvjp(_chunks_forward, _chunks_backward, symbolic_zeros=True)


def _entropy(logprobs: Float[Array, "N V"], targets: Int[Array, " N"]) -> Float[Array, " N"]:
    """-Σ p log p."""
    return -(jnp.exp(logprobs) * logprobs).sum(axis=-1)


def _is_likeliest(logprobs: Float[Array, "N V"], targets: Int[Array, " N"]) -> Float[Array, " N"]:
    return (logprobs.argmax(axis=-1) == targets).astype(jnp.float32)
