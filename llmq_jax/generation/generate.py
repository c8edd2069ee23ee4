"""Generation: one compiled prefill, then a compiled `while_loop` that ends when every row is done.

Prompts of a batch are padded on the right, each row decodes at positions of its own, and a cache slot beyond a row's
position is invisible: a row gets the tokens that it would get alone. Every row draws from its own seed, so that its
samples do not depend on its neighbours either.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.field_types import require_model
from llmq_jax.generation.prompt_cache import PromptCache
from llmq_jax.generation.request import Generation, Ids, Request, RowText, drafts_of
from llmq_jax.generation.sampling import Sampler, takes_sampler
from llmq_jax.host_copies import to_host

if TYPE_CHECKING:
    from llmq_jax.language_model import LanguageModel
else:
    LanguageModel = Any  # It imports this package.

STRETCH = 16
"""Stop strings are searched for each time that this many tokens have been decoded."""


@takes_sampler
def generate(
    lm: LanguageModel,
    prompts: Any,
    max_new_tokens: int | None = None,
    sampler: Sampler | None = None,
    stop: Sequence[Any] | SupportsIndex | str | None = None,
    seed: SupportsIndex | Ids = 0,
    *,
    draft: LanguageModel | str | None = None,
    draft_tokens: int | None = None,
    samples: int = 1,
    prompt_cache: PromptCache | None = None,
) -> Generation:
    """Continue every prompt (one string, or several strings or lists of token ids) by up to `max_new_tokens` tokens:
    64, or what the context has room for, unless it is given.

    Each prompt is read once and continued `samples` times, in neighbouring rows.

    A row ends at any of the `stop` tokens (which is kept and counted) or stop strings (cut from the text). None stands
    for the end tokens of the model's generation config, which stop strings add to and stop tokens replace; () stops at
    nothing. Row r draws from `row_seed(seed, r)`, which is the seed itself in row 0, or from the r-th of a list of
    seeds. `sampler=lq.Sampler(temperature=0.5, top_k=50)` says how tokens are drawn, at temperature 0 greedily; without
    one, temperature 0.8 and top_p 0.95. Raises BadInput where a prompt and its new tokens do not fit the model's
    context, for an empty prompt, an id outside the vocabulary, text without a tokenizer, and options that are out of
    range or have no effect.

    `draft` proposes tokens that the model then checks several at a time (`generation.speculative`): another
    LanguageModel of the same vocabulary, which proposes `draft_tokens` (4), or "mtp", the model's own modules of
    multi-token prediction. Greedy tokens stay the same (except, in half precision, at near-ties, which a pass over
    several tokens may round the other way); sampled ones are other draws from the same distribution.

    `prompt_cache`, for one prompt continued once without a draft, holds what earlier calls have read: the beginning
    that the prompt has in common with it is not computed again.
    """
    request = Request.create(
        lm,
        [prompts] if isinstance(prompts, str) else prompts,
        max_new_tokens,
        sampler,
        stop,
        seed,
        draft,
        draft_tokens,
        samples,
        prompt_cache,
    )
    state = request.start()
    if not request.stop_strings:
        return request.finish(request.advance(state, request.max_new_tokens))
    reached, texts = 1, [RowText(request, row) for row in range(len(request.seeds))]
    while not bool(state.done.all()) and reached < request.max_new_tokens:
        state = request.stop_at_strings(state, texts)
        reached = min(reached + STRETCH, request.max_new_tokens)
        state = request.advance(state, reached)
    return request.finish(request.stop_at_strings(state, texts), texts)


@takes_sampler
def stream(
    lm: LanguageModel,
    prompt: str | Ids,
    max_new_tokens: int | None = None,
    sampler: Sampler | None = None,
    stop: Sequence[Any] | SupportsIndex | str | None = None,
    seed: SupportsIndex = 0,
    *,
    draft: LanguageModel | str | None = None,
    draft_tokens: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[str]:
    """Yield the text of one continuation as it comes; the pieces join to what `generate` gives.

    A piece is held back while it may still change: half of a character, characters spelled as bytes by a tokenizer with
    byte fallback until a token of another kind comes, or the beginning of a stop string. Arguments and errors are those
    of `generate`, and errors are raised at once; BadInput also for a model without a tokenizer. The value of the
    StopIteration at the end is the row's `Generation.drafts`.
    """
    require_model(lm)
    if lm.tokenizer is None:
        raise BadInput("this model has no tokenizer, so there is no text to stream; use generate with token ids")
    # Checked now, not when the first piece is asked for.
    request = Request.create(
        lm, [prompt], max_new_tokens, sampler, stop, seed, draft, draft_tokens, prompt_cache=prompt_cache
    )
    return _pieces(request)


def _pieces(request: Request) -> Generator[str, None, np.ndarray | None]:
    row, shown = RowText(request, 0), 0
    state, finished = request.start(), False
    try:
        while not finished:
            tokens, length, done = to_host((state.tokens[0], state.lengths[0], state.done[0]))
            ended = bool(done or length == request.max_new_tokens)
            row.read_on(tokens[row.read : length].tolist(), ended)
            finished = ended or row.stop is not None
            end = row.stop if finished else request.certain(row.text)
            if row.text[shown:end]:
                yield row.text[shown:end]
                shown = len(row.text[:end])
            if not finished:
                state = request.advance(state, row.read + 1)
        return drafts_of(state)
    finally:  # the caller may stop asking
        request.remember(state)
