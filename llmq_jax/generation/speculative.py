"""Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

A draft proposes K tokens, and the model reads them all in one pass, which costs little more than reading one token,
because decoding waits for the weights to be read. The model accepts a part of them, and always adds one of its own.

With p the model's distribution and q that from which the draft drew token d, d is accepted with probability
min(1, p(d) / q(d)). At the first rejection a token is drawn from max(p - q, 0), normalised; after K acceptances one
from p. The resulting tokens are distributed as p, whatever the draft is (Chen et al., theorem 1). In greedy decoding a
token is accepted if it is the model's own choice, and the result is that of plain decoding.

A draft is another model of the same vocabulary (`ModelDraft`), or the model's own modules of multi-token prediction
(`MultiTokenDraft`; DeepSeek-V3, arXiv:2412.19437, section 5.4.3). Each keeps what it needs in a state of its own, whose
caches are rolled back as all are: by writing at an earlier position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.generation.decoding import DecodeState, Layers, divided, in_order, is_end, read_prompts, readable
from llmq_jax.generation.sampling import Sampler, draw, first_largest, marked, sample
from llmq_jax.models.decoder import Decoder, Output, segments_of
from llmq_jax.models.deepseek3 import DeepSeek3

# Indices of a row's random keys in one pass, beside 0, 1, ..., those of its drafts.
ACCEPTANCE, RESIDUAL = 1_000_000, 1_000_001

Sliced = tuple[dict[str, Any], Layers]
"""(variables outside the layers or modules that a draft runs, variables of each of these)."""
ReadFrom = tuple[dict[str, Any], Layers | None]
"""What a draft reads prompts from, as `LanguageModel.read_from` has it; (all variables, None) for modules."""
Draw = Callable[[Array, int], Array]
"""A token for each row, from logits [B, V] and the index of the draft."""


class SpeculativeState(DecodeState):
    """Rows advance by different numbers of tokens, which `lengths` counts; `step` counts passes."""

    draft: Any
    """The `State` of a `ModelDraft` or a `MultiTokenDraft`."""
    drafted: jax.Array
    """int32 [B]: tokens that a draft proposed."""
    accepted: jax.Array
    """int32 [B]: those of them that were accepted."""


@dataclass(frozen=True)
class ModelDraft:
    """Another model, which drafts `count` tokens one after another."""

    model: Decoder
    count: int

    class State(struct.PyTreeNode):
        caches: tuple[Any, ...]
        recent: jax.Array
        """int32 [B, 2]: the newest token, last, and the one before it, which the draft may not have read yet."""

    def start(
        self, read_from: ReadFrom, output: Output, prompts: Array, lengths: Array, newest: Array, length: int
    ) -> State:
        _, caches = read_prompts(self.model, *read_from, prompts, lengths, length, self.count)
        before = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
        return self.State(caches, jnp.stack([before, newest], axis=1))

    def propose(
        self, variables: Sliced, state: State, positions: Array, draw: Draw
    ) -> tuple[Int[Array, "B K"], Float[Array, "B K V"], State]:
        outside, layers = variables
        tokens, places = state.recent, positions[:, None] + jnp.arange(-1, 1)
        caches, drafts, all_logits = state.caches, [], []
        for index in range(self.count):
            output = self.model.decode(outside, layers, tokens, places, caches)
            caches = output.caches
            logits = self.model.apply(outside, output.hidden[:, -1], method="unembed")
            drafts.append(draw(logits, index))
            all_logits.append(logits)
            tokens, places = drafts[-1][:, None], places[:, -1:] + 1
        return jnp.stack(drafts, 1), jnp.stack(all_logits, 1), state.replace(caches=caches)

    def follow(self, state: State, output: Output, tokens: Array, gained: Array) -> State:
        """The state after a pass in which each row gained the first `gained` of its `tokens` [B, K + 1]."""
        return state.replace(recent=_last(jnp.concatenate([state.recent, tokens], axis=1), gained, 2))


@dataclass(frozen=True)
class MultiTokenDraft:
    """The D modules of multi-token prediction, each of which drafts one token.

    Module k at place i reads the hidden state there and token i + k, which past the newest token is a draft. Places
    that read drafts are read again once the tokens are known: the last 2 D places in every pass.
    """

    model: DeepSeek3

    class State(struct.PyTreeNode):
        caches: tuple[Any, ...]
        """By module."""
        previous: jax.Array
        """[B, 2 D, M]: the hidden states that the first module reads, at the last places that the model has read."""
        recent: jax.Array
        """int32 [B, 2 D]: the tokens one place further on; the last is the newest."""

    @property
    def count(self) -> int:
        return self.model.config.num_nextn_predict_layers

    @property
    def places(self) -> int:
        return 2 * self.count

    def start(
        self, read_from: ReadFrom, output: Output, prompts: Array, lengths: Array, newest: Array, length: int
    ) -> State:
        caches = self.model.create_ahead_caches(len(prompts), prompts.shape[1], output.hidden.dtype)
        segment_ids = segments_of(lengths, prompts.shape[1])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        ahead = self.model.apply(
            read_from[0], output, prompts, segment_ids=segment_ids, caches=stacked, method="look_ahead"
        )
        caches = tuple(jax.tree.map(lambda leaf, k=k: leaf[k], ahead.caches).extend(length) for k in range(self.count))
        caches = divided(caches)
        places = jnp.maximum(lengths[:, None] - self.places + jnp.arange(self.places), 0)
        previous = jnp.take_along_axis(self.model.before_modules(output), places[..., None], axis=1)
        after = jnp.minimum(places[:, :-1] + 1, prompts.shape[1] - 1)
        recent = jnp.concatenate([jnp.take_along_axis(prompts, after, axis=1), newest[:, None]], axis=1)
        return self.State(caches, previous, recent)

    def propose(
        self, variables: Sliced, state: State, positions: Array, draw: Draw
    ) -> tuple[Int[Array, "B K"], Float[Array, "B K V"], State]:
        outside, modules = variables
        places = positions[:, None] - self.places + jnp.arange(self.places)
        real = (places >= 0).astype(jnp.int32)  # A short prompt has fewer.
        previous, recent, caches, drafts, all_logits = state.previous, state.recent, [], [], []
        for index, (module, cache) in enumerate(zip(modules, state.caches, strict=True)):
            hidden, previous, cache = self.model.decode_ahead(outside, module, previous, recent, places, real, cache)
            logits = self.model.apply(outside, hidden[:, -1], method="unembed")
            drafts.append(draw(logits, index))
            all_logits.append(logits)
            caches.append(cache)
            recent = jnp.concatenate([recent[:, 1:], drafts[-1][:, None]], axis=1)
        return jnp.stack(drafts, 1), jnp.stack(all_logits, 1), state.replace(caches=tuple(caches))

    def follow(self, state: State, output: Output, tokens: Array, gained: Array) -> State:
        return state.replace(
            previous=_last(
                jnp.concatenate([state.previous, self.model.before_modules(output)], axis=1), gained, self.places
            ),
            recent=_last(jnp.concatenate([state.recent, tokens], axis=1), gained, self.places),
        )


Draft = ModelDraft | MultiTokenDraft


def _last(rows: Array, gained: Int[Array, " B"], count: int) -> Array:
    """From [B, count + K + 1, ...], old entries and K + 1 new ones: the `count` up to the `gained`-th new one."""
    index = gained[:, None] + jnp.arange(count)
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *(1,) * (rows.ndim - 2)), axis=1)


@partial(jax.jit, static_argnames=("draft", "length"))
def start_draft(
    draft: Draft,
    read_from: ReadFrom,
    state: DecodeState,
    output: Output,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    *,
    length: int,
) -> SpeculativeState:
    """The state of `prefill` with that of the draft added."""
    zeros = jnp.zeros_like(state.lengths)
    fields = {name: getattr(state, name) for name in DecodeState.__dataclass_fields__}
    begun = draft.start(read_from, output, prompts, prompt_lengths, state.newest, length)
    return readable(SpeculativeState(**fields, draft=begun, drafted=zeros, accepted=zeros), "drafted", "accepted")


@partial(jax.jit, static_argnames=("model", "draft", "sampler", "end_tokens"), donate_argnames=("state",))
def advance_by_drafts(
    model: Decoder,
    draft: Draft,
    outside: dict[str, Any],
    layers: Layers,
    draft_variables: Sliced,
    state: SpeculativeState,
    until: jax.Array,
    limit: jax.Array,
    *,
    sampler: Sampler,
    end_tokens: tuple[int, ...],
) -> SpeculativeState:
    """Decode until every row has `until` new tokens or is done. No row gets more than `limit`."""

    index = jnp.arange(draft.count + 1)

    def unfinished(state: SpeculativeState) -> Array:
        return (~state.done & (state.lengths < until)).any()

    def one_pass(state: SpeculativeState) -> SpeculativeState:
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
        seen = [] if state.seen is None else [state.seen]  # before each draft, and after the last

        def draw(logits: Array, index: int) -> Array:
            own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            draft = sample(logits, own_keys, sampler, seen[-1] if seen else None)[0]
            if seen:
                seen.append(marked(seen[-1], draft))
            return draft

        begun: Any  # a state of this draft
        drafts, draft_logits, begun = draft.propose(draft_variables, state.draft, state.positions, draw)
        read = jnp.concatenate([state.newest[:, None], drafts], axis=1)
        places = state.positions[:, None] + index
        output = model.decode(outside, layers, read, places, state.caches)
        logits = model.apply(outside, output.hidden, method="unembed")
        before = jnp.stack(seen, axis=1) if seen else None
        tokens, accepted = accept(logits, drafts, draft_logits, keys, sampler, before)
        live = ~state.done
        kept = _kept(tokens, accepted, end_tokens) & (index < (limit - state.lengths)[:, None]) & live[:, None]
        gained = kept.sum(axis=1)
        state = _append(state, logits, tokens, kept, sampler)
        ended = (kept & is_end(tokens, end_tokens)).any(axis=1)
        return state.replace(
            caches=in_order(output.caches),
            done=state.done | ended | (state.lengths >= limit),
            draft=draft.follow(begun.replace(caches=in_order(begun.caches)), output, tokens, gained),
            drafted=state.drafted + live * draft.count,
            accepted=state.accepted + jnp.minimum(accepted, gained),
        )

    return readable(jax.lax.while_loop(unfinished, one_pass, state), "drafted", "accepted")


def accept(
    logits: Float[Array, "B K1 V"],
    drafts: Int[Array, "B K"],
    draft_logits: Float[Array, "B K V"],
    keys: Array,
    sampler: Sampler,
    seen: Bool[Array, "B K1 V"] | None = None,
) -> tuple[Int[Array, "B K1"], Int[Array, " B"]]:
    """(the drafts that are accepted and, after them, one token of the model's own; how many are accepted).

    `logits` are the model's after the newest token and after each draft, `seen` the tokens of the text up to there.
    Later entries of a row mean nothing.
    """
    if seen is not None:
        logits, draft_logits = sampler.penalise(logits, seen), sampler.penalise(draft_logits, seen[:, :-1])
    count = drafts.shape[1]
    index = jnp.arange(count + 1)
    if sampler.temperature == 0.0:
        own = first_largest(logits)
        accepted = _leading(drafts == own[:, :-1])
        return own, accepted

    def probabilities(logits: Array) -> Array:
        flat = sampler.filter(logits.reshape(-1, logits.shape[-1]))
        return jax.nn.softmax(flat, axis=-1).reshape(logits.shape)

    wanted, proposed = probabilities(logits), probabilities(draft_logits)
    p, q = (jnp.take_along_axis(x[:, :count], drafts[..., None], axis=-1)[..., 0] for x in (wanted, proposed))
    chance = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPTANCE), (count,)))(keys)
    accepted = _leading(chance * q < p)
    # After the last draft nothing was proposed: the residual is p itself.
    residual = jnp.maximum(wanted - jnp.pad(proposed, ((0, 0), (0, 1), (0, 0))), 0.0)
    at = accepted[:, None, None]
    residual = jnp.take_along_axis(residual, at, axis=1)[:, 0]
    # Rounding may leave nothing where p and q are nearly the same.
    p_there = jnp.take_along_axis(wanted, at, axis=1)[:, 0]
    residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p_there)
    own = draw(residual, jax.vmap(jax.random.fold_in, (0, None))(keys, RESIDUAL))
    drafts = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(index < accepted[:, None], drafts, own[:, None]), accepted


def _leading(holds: Array) -> Int[Array, " B"]:
    """How many entries of each row are true before the first false one."""
    return jnp.cumprod(holds.astype(jnp.int32), axis=1).sum(axis=1)


def _kept(tokens: Int[Array, "B K1"], accepted: Int[Array, " B"], end_tokens: tuple[int, ...]) -> Bool[Array, "B K1"]:
    """Mask of the tokens that a row gains: the accepted drafts and one token more, up to and with an end token."""
    ends = is_end(tokens, end_tokens)
    before = jnp.cumsum(ends, axis=1) - ends
    return (before == 0) & (jnp.arange(tokens.shape[1]) <= accepted[:, None])


def _append(
    state: SpeculativeState,
    logits: Float[Array, "B K1 V"],
    tokens: Int[Array, "B K1"],
    kept: Bool[Array, "B K1"],
    sampler: Sampler,
) -> SpeculativeState:
    """Append to each row those of its `tokens` that are `kept`, which are the first ones."""
    gained = kept.sum(axis=1)
    logprobs = jax.nn.log_softmax(logits / (sampler.temperature or 1.0), axis=-1)
    logprobs = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    rows = jnp.arange(len(tokens))[:, None]
    nowhere = state.tokens.shape[1]
    slots = jnp.where(kept, state.lengths[:, None] + jnp.arange(tokens.shape[1]), nowhere)
    newest = jnp.take_along_axis(tokens, jnp.maximum(gained - 1, 0)[:, None], axis=1)[:, 0]
    seen = state.seen
    if seen is not None:
        seen |= (jax.nn.one_hot(tokens, seen.shape[-1], dtype=bool) & kept[..., None]).any(axis=1)
    return state.replace(
        step=state.step + 1,
        tokens=state.tokens.at[rows, slots].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[rows, slots].set(logprobs, mode="drop"),
        lengths=state.lengths + gained,
        positions=state.positions + gained,
        newest=newest,  # of a row that gained none, and is done, any
        seen=seen,
    )
