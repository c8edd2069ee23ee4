"""The compiled part of generation: prefill, and a `while_loop` whose state holds everything about every row."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Int

from llmq_jax.generation.sampling import Sampler, marked, sample
from llmq_jax.layers.axes import axis_sizes, constrain, replicated, target_platform
from llmq_jax.models.decoder import Decoder, Output


class DecodeState(struct.PyTreeNode):
    """The loop's carry. Everything but `step` is per row."""

    step: jax.Array
    """int32: new tokens so far."""
    tokens: jax.Array
    """int32 [B, at least max_new_tokens]."""
    logprobs: jax.Array
    """float32, of the same shape."""
    lengths: jax.Array
    """int32 [B]."""
    done: jax.Array
    """bool [B]."""
    positions: jax.Array
    """int32 [B]: the position of the newest token."""
    newest: jax.Array
    """int32 [B]: the token that the next pass reads."""
    keys: jax.Array
    """Random keys [B]."""
    caches: tuple[Any, ...]
    seen: jax.Array | None
    """bool [B, V]: which tokens the prompt and the new text hold; None for a sampler that does not ask."""


State = TypeVar("State", bound=DecodeState)
Caches = tuple[Any, ...]
Layers = tuple[dict[str, Any], ...]


@partial(
    jax.jit, static_argnames=("model", "sampler", "length", "new_tokens", "end_tokens", "pad", "lookahead", "samples")
)
def prefill(
    model: Decoder,
    variables: dict[str, Any],
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    seeds: jax.Array,
    *,
    sampler: Sampler,
    length: int,
    new_tokens: int,
    end_tokens: tuple[int, ...],
    pad: int,
    lookahead: int = 0,
    samples: int = 1,
    layers: Layers | None = None,
    held: Caches = (),
    start: jax.Array | int = 0,
    seen: jax.Array | None = None,
) -> tuple[DecodeState, Output | None]:
    """Read the prompts [P, T] into caches of `length` slots, with room for `new_tokens`, and draw the first token of
    each row; `samples` neighbouring rows, B in all, continue each prompt. With `layers`, these are the variables of
    each layer, and `variables` those outside. The prompts' first `start` tokens are not given: they are in the caches
    `held`. `seen` is that of the state, of the whole prompts [P, V].

    `lookahead` is the number of tokens that may be rolled back. If it is above 0, the model's output for the prompts is
    returned with the state: a draft may read it.
    """
    batch = prompts.shape[0] * samples
    output, caches = read_prompts(model, variables, layers, prompts, prompt_lengths, length, lookahead, held, start)
    last = jnp.take_along_axis(output.hidden, prompt_lengths[:, None, None] - 1, axis=1)[:, 0]
    if samples > 1:
        last, prompt_lengths, caches, seen = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, samples, axis=0), (last, prompt_lengths, caches, seen)
        )
        caches = divided(caches)
    state = DecodeState(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, new_tokens), pad, jnp.int32),
        logprobs=jnp.zeros((batch, new_tokens), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        positions=start + prompt_lengths - 1,
        newest=jnp.zeros(batch, jnp.int32),
        keys=jax.vmap(jax.random.key)(seeds),
        caches=caches,
        seen=None if seen is None else constrain(seen, "batch", None),
    )
    logits = model.apply(variables, last, method="unembed")
    read = output.replace(caches=None, counts=None) if lookahead else None
    return readable(_append(state, logits, sampler, end_tokens)), read


def read_prompts(
    model: Decoder,
    variables: dict[str, Any],
    layers: Layers | None,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    length: int,
    lookahead: int,
    held: Caches = (),
    start: jax.Array | int = 0,
) -> tuple[Output, tuple[Any, ...]]:
    """A pass over the prompts, after what the caches `held` hold: (its output, one cache per layer, of `length` slots).
    `layers` as in `prefill`."""
    rows, width = prompts.shape
    positions = jnp.broadcast_to(start + jnp.arange(width), prompts.shape)
    caches = tuple(cache.extend(length) for cache in held)
    empty = model.create_caches(rows, width, model.compute_dtype(variables, layers or ()), lookahead)
    if layers is None:
        stacked = model.stack_caches(caches) if held else empty
        output = model.apply(variables, prompts, positions, caches=stacked, lengths=prompt_lengths, method="forward")
        caches = model.slice_caches(output.caches)
    else:
        caches = caches or model.slice_caches(empty)
        output = model.decode(variables, layers, prompts, positions, caches, prompt_lengths)
        caches = output.caches
    return output, divided(tuple(cache.extend(length) for cache in caches))


def divided(caches: Caches) -> Caches:
    """A sharding constraint on caches of layers: each device holds those of the rows and the heads that it computes."""
    placed: Caches = jax.tree.map(lambda leaf: constrain(leaf, "batch", "heads" if leaf.ndim == 4 else None), caches)
    return placed


def in_order(caches: Caches) -> Caches:
    """Caches that a loop updates, with the order of their axes in memory kept. XLA's GPU backend would otherwise turn
    some around before the loop and back after it, in as much memory again. On a mesh it would join them for that."""
    if target_platform() != "gpu" or axis_sizes():
        return caches
    ordered: Caches = jax.tree.map(lambda leaf: with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim)))), caches)
    return ordered


@partial(jax.jit, static_argnames=("model", "sampler", "end_tokens"), donate_argnames=("state",))
def advance(
    model: Decoder,
    outside: dict[str, Any],
    layers: Layers,
    state: DecodeState,
    until: jax.Array,
    *,
    sampler: Sampler,
    end_tokens: tuple[int, ...],
) -> DecodeState:
    """Decode until there are `until` new tokens or every row is done."""

    def unfinished(state: DecodeState) -> Array:
        return (state.step < until) & ~state.done.all()

    def next_token(state: DecodeState) -> DecodeState:
        output = model.decode(outside, layers, state.newest[:, None], state.positions[:, None], state.caches)
        logits = model.apply(outside, output.hidden[:, 0], method="unembed")
        return _append(state.replace(caches=in_order(output.caches)), logits, sampler, end_tokens)

    return readable(jax.lax.while_loop(unfinished, next_token, state))


def _append(state: DecodeState, logits: jax.Array, sampler: Sampler, end_tokens: tuple[int, ...]) -> DecodeState:
    """Draw the next token of every row that is not done."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    drawn, logprobs = sample(logits, keys, sampler, state.seen)
    live = ~state.done
    ended = is_end(drawn, end_tokens)

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        # As slices: for `.at[:, step]` XLA would check for every token that the index is inside.
        here = jax.lax.dynamic_index_in_dim(into, state.step, axis=1, keepdims=False)
        written: jax.Array = jax.lax.dynamic_update_index_in_dim(into, jnp.where(live, new, here), state.step, axis=1)
        return written

    return state.replace(
        step=state.step + 1,
        tokens=put(state.tokens, drawn),
        logprobs=put(state.logprobs, logprobs),
        lengths=state.lengths + live,
        done=state.done | ended,
        positions=jnp.where(live, state.positions + 1, state.positions),
        newest=jnp.where(live, drawn, state.newest),
        seen=None if state.seen is None else marked(state.seen, drawn),
    )


def readable(state: State, *others: str) -> State:
    """The state with the fields that the caller reads, among them `others`, replicated on every device of a mesh, for
    every process."""
    names = ("step", "tokens", "logprobs", "lengths", "done", *others)
    return state.replace(**replicated({name: getattr(state, name) for name in names}))


def is_end(tokens: Int[Array, "*batch"], end_tokens: tuple[int, ...]) -> Bool[Array, "*batch"]:
    return (tokens[..., None] == jnp.asarray(end_tokens, jnp.int32)).any(-1)
