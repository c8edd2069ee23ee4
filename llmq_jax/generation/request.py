"""One call of `generate` or `stream`: its prompts and options checked, the compiled functions bound to them, and the
text of its rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, SupportsIndex

import jax.numpy as jnp
import numpy as np

from llmq_jax.counts import counted
from llmq_jax.data.batching import pad
from llmq_jax.data.length_buckets import power_of_two
from llmq_jax.data.text_stream import TextStream, decode_behind, last_text
from llmq_jax.defaults import MTP
from llmq_jax.errors import BadInput
from llmq_jax.field_types import refuse_consumed, require_model, scalar, whole
from llmq_jax.generation.decoding import Caches, DecodeState, advance, prefill
from llmq_jax.generation.prompt_cache import PromptCache
from llmq_jax.generation.sampling import DEFAULT, Sampler, row_seed
from llmq_jax.generation.speculative import (
    Draft,
    ModelDraft,
    MultiTokenDraft,
    SpeculativeState,
    advance_by_drafts,
    start_draft,
)
from llmq_jax.host_copies import to_host
from llmq_jax.models.deepseek3 import DeepSeek3, modules_ahead

if TYPE_CHECKING:
    from llmq_jax.language_model import LanguageModel
else:
    LanguageModel = Any  # It imports this package.

# Lengths are rounded up, so that requests of similar length share compiled programs: prompts to a power of two, but
# long ones only to a multiple of the second number, because padding costs computation.
SHORTEST_PROMPT, LONGEST_PROMPT_STEP = 32, 512
# Caches, whose length the decoding loop is compiled for, to a power of two: a growing conversation compiles ever more
# rarely. Every token reads the whole cache, but up to this length that costs next to nothing beside the weights.
SHORTEST_CACHE = 256
# Token ids, or seeds: lists and arrays of integers.
Ids = Sequence[SupportsIndex] | np.ndarray

# How many tokens come after a prompt, if the context has room for them and no number is given.
NEW_TOKENS = 64
# How many tokens a draft model proposes at a time.
DRAFT_TOKENS = 4


@dataclass(frozen=True)
class Generation:
    """What came after each prompt."""

    tokens: np.ndarray
    """int32 [B, max_new_tokens]: new tokens only, the end token included, padding after it."""
    lengths: np.ndarray
    """int32 [B]: the number of new tokens, the end token counted."""
    logprobs: np.ndarray
    """float32 [B, max_new_tokens]: log-probability of each new token at the temperature; 0 in the padding."""
    text: list[str] | None
    """The new tokens decoded, without special tokens and stop string. After a prompt that is a text this is what to
    append to it, the space between them included; after token ids it is a text of its own. None for a model without a
    tokenizer."""
    drafts: np.ndarray | None = None
    """int32 [B, 2]: the tokens that a draft proposed, and those of them that the model accepted, before a stop string
    cut the row. None without a draft."""

    @property
    def drafted(self) -> int:
        """Tokens that a draft proposed, over all rows."""
        return 0 if self.drafts is None else int(self.drafts[:, 0].sum())

    @property
    def accepted(self) -> int:
        """Those of them that the model accepted."""
        return 0 if self.drafts is None else int(self.drafts[:, 1].sum())


class RowText:
    """The text of one row, read as its tokens come, up to the first token with which it holds a stop string."""

    def __init__(self, request: "Request", row: int):
        assert request.lm.tokenizer is not None
        self.text = ""
        """The text so far that can no longer change."""
        self.read = 0
        """The number of tokens read."""
        self.stop: int | None = None
        """Where in the text the stop string begins; None while there is none."""
        self._request = request
        self._stream = TextStream(request.lm.tokenizer, skip_special_tokens=True, behind=request.behind[row])
        self._bytes = request.lm.tokenizer.byte_tokens
        self._longest = max(map(len, request.stop_strings), default=0)
        self._last_bytes = {string.encode()[-1] for string in request.stop_strings}

    def read_on(self, tokens: Iterable[int], ended: bool) -> None:
        """Read further tokens of the row; `ended` says that there will be no others."""
        for token in tokens:
            if self.stop is not None:
                return
            self.read += 1
            if token not in self._request.end_tokens:
                piece = self._stream.push(token)
                # If the row stops at this token, what the stream holds back is text too. It is searched as well, if
                # this token may be the last of a stop string.
                completes = self._longest and self._bytes.get(token) in (None, *self._last_bytes)
                self._add(piece, self._stream.held() if completes else "")
        if ended and self.stop is None:
            self._add(self._stream.finish())

    def _add(self, piece: str, held: str = "") -> None:
        start = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        self.stop = self._request.stop_position(self.text + held, start)
        if self.stop is not None:
            self.text += self._stream.finish()


@dataclass(frozen=True)
class Request:
    """One call of `generate` or `stream`: its prompts padded and checked, and the compiled functions bound to them."""

    lm: LanguageModel
    prompts: np.ndarray
    prompt_lengths: np.ndarray
    max_new_tokens: int
    sampler: Sampler
    end_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]
    seeds: np.ndarray
    pad: int
    behind: tuple[tuple[int, ...], ...]
    """For each row the token of its prompt after which the new text is decoded (`last_text`); () where that is a text
    of its own."""
    draft: Draft | None = None
    draft_lm: LanguageModel | None = None
    """The model whose variables the draft reads."""
    samples: int = 1
    """Rows that continue each prompt."""
    prompt_cache: PromptCache | None = None

    @classmethod
    def create(
        cls,
        lm: LanguageModel,
        prompts: Iterable[Any],
        max_new_tokens: int | None,
        sampler: Any,
        stop: Any,
        seed: Any,
        draft: LanguageModel | str | None = None,
        draft_tokens: int | None = None,
        samples: int = 1,
        prompt_cache: PromptCache | None = None,
    ) -> "Request":
        require_model(lm)
        if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
            raise BadInput(f"prompts={prompts!r:.60} must be a text, or a list of texts or of lists of token ids")
        given = [scalar(prompt) for prompt in prompts]
        rows = [_token_ids(lm, prompt, i) for i, prompt in enumerate(given)]
        if not rows:
            raise BadInput("no prompt was given; pass at least one")
        if not isinstance(sampler, Sampler | None):
            raise BadInput(f"sampler={sampler!r} is not a Sampler; pass one, as Sampler(temperature=0.8)")
        context = lm.config.max_position_embeddings
        if max_new_tokens is None:  # where there is no room for one, what is said below
            max_new_tokens = max(1, min(NEW_TOKENS, context - max(map(len, rows))))
        max_new_tokens, samples = whole(max_new_tokens, "max_new_tokens"), whole(samples, "samples")
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens={max_new_tokens} must be at least 1")
        if samples < 1:
            raise BadInput(f"samples={samples} must be at least 1")
        of_prompts = [
            last_text(lm.tokenizer, row) if lm.tokenizer is not None and isinstance(prompt, str) and prompt else ()
            for prompt, row in zip(given, rows, strict=True)
        ]
        behind = tuple(each for each in of_prompts for _ in range(samples))
        if draft is not None:  # a draft reads the prompt of every row
            rows, samples = [row for row in rows for _ in range(samples)], 1
        for i, row in enumerate(rows):
            if len(row) >= context:
                raise BadInput(
                    f"prompt {i} has {counted(len(row), 'token')}, which leave no room in the model's context of "
                    f"{context}; shorten it"
                )
            if len(row) + max_new_tokens > context:
                raise BadInput(
                    f"prompt {i} has {counted(len(row), 'token')}, which with {max_new_tokens} new ones exceed the "
                    f"model's context of {context}; shorten the prompt or lower max_new_tokens"
                )
        padded, lengths = _padded(rows, context)
        end_tokens, stop_strings = _stops(lm, stop)
        count = len(rows) * samples
        seeds = _seeds(seed, count)
        pad = lm.generation.pad_token_id
        if pad is None:
            pad = end_tokens[0] if end_tokens else 0
        if prompt_cache is not None:
            if not isinstance(prompt_cache, PromptCache):
                raise BadInput(f"prompt_cache={prompt_cache!r} is not a PromptCache; pass lq.PromptCache()")
            if count > 1 or draft is not None:
                raise BadInput("prompt_cache holds one text; give one prompt, one sample and no draft, or leave it out")
        drafting = _drafting(lm, draft, draft_tokens, int(lengths.max()) + max_new_tokens)
        return cls(
            lm,
            padded,
            lengths,
            max_new_tokens,
            sampler or DEFAULT,
            end_tokens,
            stop_strings,
            seeds,
            pad,
            behind,
            *drafting,
            samples,
            prompt_cache,
        )

    def start(self) -> DecodeState:
        if self.prompt_cache is not None:
            read, caches = self.prompt_cache.begins(self.lm, self.only_prompt)
            unread = self.only_prompt[read:]
            if read and len(unread) <= max(LONGEST_PROMPT_STEP, read):
                return self._read_on(unread, read, caches)
        state, output = self._prefill(self.prompts, self.prompt_lengths)
        if self.draft is None:
            return state
        prompts = jnp.asarray(self.prompts), jnp.asarray(self.prompt_lengths)
        assert self.draft_lm is not None
        batch = self._batch if self.draft_lm is self.lm else len(self.seeds)
        of_model = not isinstance(self.draft, MultiTokenDraft)
        read_from = self.draft_lm.read_from(batch, self.prompts.size) if of_model else (self.lm.variables, None)
        begun: DecodeState = start_draft(self.draft, read_from, state, output, *prompts, length=self._slots)
        return begun

    def _read_on(self, unread: list[int], read: int, caches: Caches) -> DecodeState:
        """Read the rest of the only prompt, in pieces: what attends to a cache has all its scores in memory."""
        for start in range(0, len(unread), LONGEST_PROMPT_STEP):
            piece = _padded([unread[start : start + LONGEST_PROMPT_STEP]], self.lm.config.max_position_embeddings)
            state, _ = self._prefill(*piece, held=caches, start=read + start)
            caches = state.caches
        return state

    def _prefill(self, prompts: np.ndarray, lengths: np.ndarray, **held: Any) -> tuple[DecodeState, Any]:
        variables, layers = self.lm.read_from(self._batch, prompts.size)
        read: tuple[DecodeState, Any] = prefill(
            self.lm.model,
            variables,
            prompts,
            lengths,
            self.seeds,
            sampler=self.sampler,
            length=self._slots,
            new_tokens=self._slots,  # more than enough, and no second length to compile for
            end_tokens=self.end_tokens,
            pad=self.pad,
            lookahead=0 if self.draft is None else self.draft.count,
            samples=self.samples,
            layers=layers,
            seen=self._seen,
            **held,
        )
        return read

    @property
    def _seen(self) -> np.ndarray | None:
        """bool [P, V]: the tokens of each prompt, also where a cache holds its beginning; None if nothing asks."""
        if not self.sampler.remembers:
            return None
        seen = np.zeros((len(self.prompts), self.lm.config.vocab_size), bool)
        for row, prompt, length in zip(seen, self.prompts, self.prompt_lengths, strict=True):
            row[prompt[:length]] = True
        return seen

    @property
    def _batch(self) -> int:
        """Tokens that a pass of decoding reads."""
        return len(self.seeds) * (1 if self.draft is None else self.draft.count + 1)

    @property
    def _slots(self) -> int:
        """The length of the caches."""
        needed = int(self.prompt_lengths.max()) + self.max_new_tokens
        return min(max(SHORTEST_CACHE, power_of_two(needed)), int(self.lm.config.max_position_embeddings))

    def advance(self, state: DecodeState, until: int) -> DecodeState:
        options = {"sampler": self.sampler, "end_tokens": self.end_tokens}
        outside, layers = self.lm.sliced(self._batch)
        advanced: DecodeState
        if self.draft is None:
            advanced = advance(self.lm.model, outside, layers, state, until, **options)
            return advanced
        assert self.draft_lm is not None
        if isinstance(self.draft, MultiTokenDraft):
            of_draft = outside, self.lm.sliced_ahead
        elif self.draft_lm is self.lm:
            of_draft = outside, layers
        else:
            of_draft = self.draft_lm.sliced(len(self.seeds))
        advanced = advance_by_drafts(
            self.lm.model, self.draft, outside, layers, of_draft, state, until, self.max_new_tokens, **options
        )
        return advanced

    def stop_at_strings(self, state: DecodeState, texts: Sequence[RowText]) -> DecodeState:
        """Mark the rows whose text holds a stop string as done, and cut them after the token that completed it."""
        tokens, lengths, done = to_host((state.tokens, state.lengths, state.done))
        lengths, done = lengths.copy(), done.copy()
        for row, text in enumerate(texts):
            ended = bool(done[row] or lengths[row] == self.max_new_tokens)
            text.read_on(tokens[row, text.read : lengths[row]].tolist(), ended)
            if text.stop is not None:
                lengths[row], done[row] = text.read, True
        past = np.arange(tokens.shape[1])[None] >= lengths[:, None]
        return state.replace(
            lengths=jnp.asarray(lengths),
            done=jnp.asarray(done),
            tokens=jnp.where(past, self.pad, state.tokens),
            logprobs=jnp.where(past, 0.0, state.logprobs),
        )

    @property
    def only_prompt(self) -> list[int]:
        ids: list[int] = self.prompts[0, : self.prompt_lengths[0]].tolist()
        return ids

    def remember(self, state: DecodeState) -> None:
        if self.prompt_cache is not None:
            self.prompt_cache.keep(self.lm, self.only_prompt, state)

    def finish(self, state: DecodeState, texts: Sequence[RowText] = ()) -> Generation:
        """What was generated; `texts` are those of all rows where these were read for stop strings."""
        self.remember(state)
        tokens, logprobs, lengths = to_host((state.tokens, state.logprobs, state.lengths))
        tokens, logprobs = tokens[:, : self.max_new_tokens], logprobs[:, : self.max_new_tokens]
        text = None
        if texts:
            text = [row.text[: row.stop] for row in texts]
        elif self.lm.tokenizer is not None:
            rows = zip(tokens, lengths, self.behind, strict=True)
            text = [self._decode(row[:length].tolist(), behind) for row, length, behind in rows]
        return Generation(tokens, lengths, logprobs, text, drafts_of(state))

    def certain(self, text: str) -> int:
        """How much of an unfinished text cannot be the beginning of a stop string."""
        end = len(text)
        for string in self.stop_strings:
            for size in range(1, len(string)):
                if text.endswith(string[:size]):
                    end = min(end, len(text) - size)
        return end

    def _decode(self, ids: list[int], behind: tuple[int, ...]) -> str:
        if ids and ids[-1] in self.end_tokens:
            ids = ids[:-1]
        assert self.lm.tokenizer is not None
        return decode_behind(self.lm.tokenizer, behind, ids, skip_special_tokens=True)

    def stop_position(self, text: str, start: int = 0) -> int | None:
        """Where the first stop string from `start` on begins."""
        found = [text.find(string, start) for string in self.stop_strings]
        return min((at for at in found if at >= 0), default=None)


def drafts_of(state: DecodeState) -> np.ndarray | None:
    """`Generation.drafts`."""
    if not isinstance(state, SpeculativeState):
        return None
    return np.stack(to_host((state.drafted, state.accepted)), axis=1)


def _drafting(
    lm: LanguageModel, draft: LanguageModel | str | None, count: int | None, needed: int
) -> tuple[Draft | None, LanguageModel | None]:
    """(the draft, the model whose variables it reads)."""
    if draft is None:
        if count is not None:
            raise BadInput(f"draft_tokens={count} has no effect without a draft; name one, or leave it out")
        return None, None
    if draft != MTP and not hasattr(draft, "variables"):
        raise BadInput(f"draft={draft!r} is neither a loaded model (lq.load) nor {MTP!r}")
    if isinstance(draft, str):
        if not modules_ahead(lm.config):
            raise BadInput(
                f"draft={MTP!r}: this {lm.config.model_type} has no modules of multi-token prediction; "
                "give a smaller model as draft"
            )
        if count is not None:
            raise BadInput(f"draft_tokens={count} has no effect beside draft={MTP!r}: each module drafts one token")
        assert isinstance(lm.model, DeepSeek3)
        return MultiTokenDraft(lm.model), lm
    refuse_consumed(draft.variables, "the draft")
    count = DRAFT_TOKENS if count is None else whole(count, "draft_tokens")
    if count < 1:
        raise BadInput(f"draft_tokens={count} must be at least 1")
    lm.require_same_vocabulary(draft, "the draft")
    if needed > draft.config.max_position_embeddings:
        longest = draft.config.max_position_embeddings
        raise BadInput(f"prompt and new tokens are {needed} in all, more than the draft's context of {longest}")
    return ModelDraft(draft.model, count), draft


def _padded(rows: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompts padded on the right, their lengths)."""
    longest = max(map(len, rows))
    step = min(max(SHORTEST_PROMPT, power_of_two(longest)), LONGEST_PROMPT_STEP)
    return pad(rows, min(-(-longest // step) * step, context))


def _token_ids(lm: LanguageModel, prompt: Any, index: int) -> list[int]:
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise BadInput("this model has no tokenizer; give prompts as lists of token ids")
        ids = lm.tokenizer.encode_prompt(prompt)
    elif isinstance(prompt, Integral):
        raise BadInput(f"prompt {index} is the number {prompt}; give a list of prompts: strings or lists of token ids")
    elif not isinstance(prompt, Iterable):
        raise BadInput(f"prompt {index} is {prompt!r}; give a string or a list of token ids")
    else:
        ids = [whole(token, f"prompt {index}: a token") for token in prompt]
    if not ids:
        raise BadInput(f"prompt {index} is empty; give it at least one token")
    for position, token in enumerate(ids):
        if not 0 <= token < lm.config.vocab_size:
            raise BadInput(
                f"prompt {index} has token id {token} at position {position}, outside the vocabulary of "
                f"{lm.config.vocab_size}; was another tokenizer used?"
            )
    return ids


def _seeds(seed: Any, count: int) -> np.ndarray:
    """The seed of each of `count` rows, from one seed or from a list of them."""
    seed = scalar(seed)
    several = isinstance(seed, Iterable) and not isinstance(seed, str)
    seeds = [whole(s, "seed") for s in (seed if several else [seed])]
    if any(not 0 <= s < 2**32 for s in seeds):
        raise BadInput(f"seed={seed!r} must lie between 0 and 2^32 - 1")
    if not several:
        seeds = [row_seed(seeds[0], row) for row in range(count)]
    if len(seeds) != count:
        raise BadInput(
            f"{counted(len(seeds), 'seed')} given for {counted(count, 'row')}; give one seed, or one for each"
        )
    return np.array(seeds, np.uint32)


def _stops(lm: LanguageModel, stop: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(end tokens, stop strings). Stop strings alone do not switch off the model's own end tokens. A stop string that
    spells a special token becomes an end token, because texts do not show special tokens."""
    if stop is None:
        return tuple(lm.generation.eos_token_id), ()
    stop = scalar(stop)
    stops = [scalar(s) for s in stop] if isinstance(stop, Iterable) and not isinstance(stop, str) else [stop]
    tokens = tuple(int(s) for s in stops if isinstance(s, Integral))
    strings = tuple(s for s in stops if isinstance(s, str))
    for s in stops:
        if not isinstance(s, str) and not (isinstance(s, Integral) and 0 <= int(s) < lm.config.vocab_size):
            raise BadInput(f"stop={s!r} is neither a string nor a token id below {lm.config.vocab_size}")
    if strings and lm.tokenizer is None:
        raise BadInput("this model has no tokenizer, so it cannot stop at a string; stop at token ids")
    if "" in strings:
        raise BadInput("a stop string is empty; it would stop before the first token")
    ends = tuple(lm.generation.eos_token_id) if strings and not tokens else tokens
    spelled = {string: _special_token(lm, string) for string in strings}
    ends += tuple(token for token in spelled.values() if token is not None)
    return tuple(dict.fromkeys(ends)), tuple(string for string, token in spelled.items() if token is None)


def _special_token(lm: LanguageModel, string: str) -> int | None:
    """The special token that the string spells, if it does. BadInput: it has other text beside one."""
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(string, allow_special=True)
    if lm.tokenizer.decode(ids) == lm.tokenizer.decode(ids, skip_special_tokens=True):
        return None
    if len(ids) > 1:
        raise BadInput(
            f"stop={string!r} holds a special token beside other text, and texts do not show special tokens; give the "
            "token alone as a stop"
        )
    return ids[0]
