"""Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

A draft proposes K tokens, and the model reads them all in one pass, which costs it little more than one token would:
decoding waits for the weights. What it would not have said is rejected, and one token of its own is always gained.

With p what the model would draw from and q what the draft drew d from, d is accepted with probability
min(1, p(d) / q(d)). At the first rejection a token is drawn from max(p - q, 0), normalised; after K acceptances one
from p. What comes out is distributed as p, whatever the draft is (theorem 1). Greedily: a draft is accepted where it is
the model's own choice, and the tokens are those of plain decoding.

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

from llmq_jax.generation.decoding import DecodeState, divided, is_end, read_prompts, readable
from llmq_jax.generation.sampling import Sampler, draw, filter_logits, first_largest, sample
from llmq_jax.models.decoder import Decoder, Output, segments_of
from llmq_jax.models.deepseek3 import DeepSeek3

# Streams of random numbers that a row draws from in one pass, beside those of its drafts 0, 1, ...
ACCEPTANCE, RESIDUAL = 1_000_000, 1_000_001

Sliced = tuple[dict[str, Any], tuple[dict[str, Any], ...]]
"""Variables outside of what a draft runs one after another, and of each of these."""
Draw = Callable[[Array, int], Array]
"""A token for each row, from logits [B, V] and the index of the draft."""


class SpeculativeState(DecodeState):
    """Rows advance by different numbers of tokens: each one's is `lengths`; `step` counts passes."""

    draft: Any
    """Of a `ModelDraft` or a `MultiTokenDraft`."""
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
        """int32 [B, 2]: the newest token and the one before, which the model may have accepted unread by the draft."""

    def start(
        self, variables: dict[str, Any], output: Output, prompts: Array, lengths: Array, newest: Array, length: int
    ) -> State:
        _, caches = read_prompts(self.model, variables, prompts, lengths, length, self.count + 1)
        before = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
        return self.State(caches, jnp.stack([before, newest], axis=1))

    def propose(
        self, variables: Sliced, state: State, positions: Array, draw: Draw
    ) -> tuple[Int[Array, "B K"], Float[Array, "B K V"], State]:
        outside, layers = variables
        tokens, places = state.recent, positions[:, None] + jnp.arange(-1, 1)
        caches, drafts, all_logits = state.caches, [], []
        for index in range(self.count):
            hidden, caches = self.model.decode(outside, layers, tokens, places, caches)
            logits = self.model.apply(outside, hidden[:, -1], method="unembed")
            drafts.append(draw(logits, index))
            all_logits.append(logits)
            tokens, places = drafts[-1][:, None], places[:, -1:] + 1
        return jnp.stack(drafts, 1), jnp.stack(all_logits, 1), state.replace(caches=caches)

    def follow(self, state: State, output: Output, tokens: Array, gained: Array) -> State:
        """After a pass that gained so many of `tokens` [B, K + 1]."""
        return state.replace(recent=_last(jnp.concatenate([state.recent, tokens], axis=1), gained, 2))


@dataclass(frozen=True)
class MultiTokenDraft:
    """The D modules of multi-token prediction, each of which drafts one token.

    Module k at place i sees what stands there in the stream and token i + k. Past the newest token these are drafts:
    the places where they were seen are read again once the tokens are known, 2 D of them in every pass.
    """

    model: DeepSeek3

    class State(struct.PyTreeNode):
        caches: tuple[Any, ...]
        """By module."""
        fed: jax.Array
        """[B, 2 D, M]: what the first module is fed at the last places that the model has read."""
        recent: jax.Array
        """int32 [B, 2 D]: the tokens one place further on; the newest is the last."""

    @property
    def count(self) -> int:
        return self.model.config.num_nextn_predict_layers

    @property
    def places(self) -> int:
        return 2 * self.count

    def start(
        self, variables: dict[str, Any], output: Output, prompts: Array, lengths: Array, newest: Array, length: int
    ) -> State:
        caches = self.model.create_ahead_caches(len(prompts), prompts.shape[1], output.hidden.dtype)
        segment_ids = segments_of(lengths, prompts.shape[1])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        ahead = self.model.apply(
            variables, output, prompts, segment_ids=segment_ids, caches=stacked, method="look_ahead"
        )
        caches = tuple(jax.tree.map(lambda leaf, k=k: leaf[k], ahead.caches).extend(length) for k in range(self.count))
        caches = divided(caches)
        places = jnp.maximum(lengths[:, None] - self.places + jnp.arange(self.places), 0)
        fed = jnp.take_along_axis(self.fed(output), places[..., None], axis=1)
        after = jnp.minimum(places[:, :-1] + 1, prompts.shape[1] - 1)
        recent = jnp.concatenate([jnp.take_along_axis(prompts, after, axis=1), newest[:, None]], axis=1)
        return self.State(caches, fed, recent)

    def fed(self, output: Output) -> Float[Array, "B T M"]:
        return output.hidden if self.model.config.mtp_hidden == "after_norm" else output.before_norm

    def propose(
        self, variables: Sliced, state: State, positions: Array, draw: Draw
    ) -> tuple[Int[Array, "B K"], Float[Array, "B K V"], State]:
        outside, modules = variables
        places = positions[:, None] - self.places + jnp.arange(self.places)
        real = (places >= 0).astype(jnp.int32)  # A short prompt has fewer.
        fed, seen, caches, drafts, all_logits = state.fed, state.recent, [], [], []
        for index, (module, cache) in enumerate(zip(modules, state.caches, strict=True)):
            hidden, fed, cache = self.model.decode_ahead(outside, module, fed, seen, places, real, cache)
            logits = self.model.apply(outside, hidden[:, -1], method="unembed")
            drafts.append(draw(logits, index))
            all_logits.append(logits)
            caches.append(cache)
            seen = jnp.concatenate([seen[:, 1:], drafts[-1][:, None]], axis=1)
        return jnp.stack(drafts, 1), jnp.stack(all_logits, 1), state.replace(caches=tuple(caches))

    def follow(self, state: State, output: Output, tokens: Array, gained: Array) -> State:
        return state.replace(
            fed=_last(jnp.concatenate([state.fed, self.fed(output)], axis=1), gained, self.places),
            recent=_last(jnp.concatenate([state.recent, tokens], axis=1), gained, self.places),
        )


Draft = ModelDraft | MultiTokenDraft


def _last(rows: Array, gained: Int[Array, " B"], count: int) -> Array:
    """Of rows [B, count + K + 1, ...] the `count` that end after the first `gained` of the new ones."""
    index = gained[:, None] + jnp.arange(count)
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *(1,) * (rows.ndim - 2)), axis=1)


@partial(jax.jit, static_argnames=("draft", "length"))
def start_draft(
    draft: Draft,
    variables: dict[str, Any],
    state: DecodeState,
    output: Output,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    *,
    length: int,
) -> SpeculativeState:
    """What prefill gave, with the draft beside it."""
    zeros = jnp.zeros_like(state.lengths)
    fields = {name: getattr(state, name) for name in DecodeState.__dataclass_fields__}
    begun = draft.start(variables, output, prompts, prompt_lengths, state.newest, length)
    return SpeculativeState(**fields, draft=begun, drafted=zeros, accepted=zeros)


@partial(jax.jit, static_argnames=("model", "draft", "sampler", "end_tokens"), donate_argnames=("state",))
def advance_by_drafts(
    model: Decoder,
    draft: Draft,
    outside: dict[str, Any],
    layers: tuple[dict[str, Any], ...],
    draft_variables: Sliced,
    state: SpeculativeState,
    until: jax.Array,
    limit: jax.Array,
    *,
    sampler: Sampler,
    end_tokens: tuple[int, ...],
) -> SpeculativeState:
    """Decode until every row has `until` new tokens or is done. None gets more than `limit`.

    The draft's variables are sliced as the model's: (outside its layers or modules, of each of these).
    """

    index = jnp.arange(draft.count + 1)

    def unfinished(state: SpeculativeState) -> Array:
        return (~state.done & (state.lengths < until)).any()

    def one_pass(state: SpeculativeState) -> SpeculativeState:
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)

        def draw(logits: Array, index: int) -> Array:
            return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, index), sampler)[0]

        begun: Any  # a state of this draft
        drafts, draft_logits, begun = draft.propose(draft_variables, state.draft, state.positions, draw)
        read = jnp.concatenate([state.newest[:, None], drafts], axis=1)
        places = state.positions[:, None] + index
        output = model.decode_output(outside, layers, read, places, state.caches)
        logits = model.apply(outside, output.hidden, method="unembed")
        tokens, accepted = accept(logits, drafts, draft_logits, keys, sampler)
        live = ~state.done
        kept = _kept(tokens, accepted, end_tokens) & (index < (limit - state.lengths)[:, None]) & live[:, None]
        gained = kept.sum(axis=1)
        state = _append(state, logits, tokens, kept, sampler)
        ended = (kept & is_end(tokens, end_tokens)).any(axis=1)
        return state.replace(
            caches=output.caches,
            done=state.done | ended | (state.lengths >= limit),
            draft=draft.follow(begun, output, tokens, gained),
            drafted=state.drafted + live * draft.count,
            accepted=state.accepted + jnp.minimum(accepted, gained),
        )

    return readable(jax.lax.while_loop(unfinished, one_pass, state))


def accept(
    logits: Float[Array, "B K1 V"],
    drafts: Int[Array, "B K"],
    draft_logits: Float[Array, "B K V"],
    keys: Array,
    sampler: Sampler,
) -> tuple[Int[Array, "B K1"], Int[Array, " B"]]:
    """(the drafts that are accepted and, after them, one token of the model's own; how many are accepted).

    `logits` are the model's after the newest token and after each draft. What stands further on means nothing.
    """
    count = drafts.shape[1]
    index = jnp.arange(count + 1)
    if sampler.temperature == 0.0:
        own = first_largest(logits)
        accepted = _leading(drafts == own[:, :-1])
        return own, accepted

    def probabilities(logits: Array) -> Array:
        flat = filter_logits(logits.reshape(-1, logits.shape[-1]), sampler)
        return jax.nn.softmax(flat, axis=-1).reshape(logits.shape)

    wanted, proposed = probabilities(logits), probabilities(draft_logits)
    p, q = (jnp.take_along_axis(x[:, :count], drafts[..., None], axis=-1)[..., 0] for x in (wanted, proposed))
    chance = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPTANCE), (count,)))(keys)
    accepted = _leading(chance * q < p)
    # After the last draft there is nothing that was proposed: what is left is p itself.
    left = jnp.maximum(wanted - jnp.pad(proposed, ((0, 0), (0, 1), (0, 0))), 0.0)
    at = accepted[:, None, None]
    left = jnp.take_along_axis(left, at, axis=1)[:, 0]
    # Rounding may leave nothing where the two are all but the same.
    left = jnp.where(left.sum(-1, keepdims=True) > 0, left, jnp.take_along_axis(wanted, at, axis=1)[:, 0])
    own = draw(left, jax.vmap(jax.random.fold_in, (0, None))(keys, RESIDUAL))
    drafts = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(index < accepted[:, None], drafts, own[:, None]), accepted


def _leading(holds: Array) -> Int[Array, " B"]:
    """How many of each row hold before the first that does not."""
    return jnp.cumprod(holds.astype(jnp.int32), axis=1).sum(axis=1)


def _kept(tokens: Int[Array, "B K1"], accepted: Int[Array, " B"], end_tokens: tuple[int, ...]) -> Bool[Array, "B K1"]:
    """The accepted drafts and one token more, up to an end token."""
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
    """The first tokens of each row, those that are kept, added to it."""
    gained = kept.sum(axis=1)
    logprobs = jax.nn.log_softmax(logits / (sampler.temperature or 1.0), axis=-1)
    logprobs = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    rows = jnp.arange(len(tokens))[:, None]
    nowhere = state.tokens.shape[1]
    slots = jnp.where(kept, state.lengths[:, None] + jnp.arange(tokens.shape[1]), nowhere)
    newest = jnp.take_along_axis(tokens, jnp.maximum(gained - 1, 0)[:, None], axis=1)[:, 0]
    return state.replace(
        step=state.step + 1,
        tokens=state.tokens.at[rows, slots].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[rows, slots].set(logprobs, mode="drop"),
        lengths=state.lengths + gained,
        positions=state.positions + gained,
        newest=jnp.where(gained > 0, newest, state.newest),
    )
