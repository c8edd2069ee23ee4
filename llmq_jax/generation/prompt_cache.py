"""What a model has read of a growing text, such as a conversation: a longer prompt is read from there on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from llmq_jax.generation.decoding import Caches, DecodeState
from llmq_jax.host_copies import to_host
from llmq_jax.layers.caches import FullCache, LatentCache, RingCache

if TYPE_CHECKING:
    from llmq_jax.language_model import LanguageModel
else:
    LanguageModel = Any  # Its package imports this one.


class Held(NamedTuple):
    """A text that was read. It is replaced as a whole, so that threads which share a PromptCache never take the caches
    of one text for those of another."""

    lm: LanguageModel | None = None
    tokens: Sequence[int] = ()
    """The text, without tokens after a stop string."""
    caches: Caches = ()
    """One per layer."""
    read: int = 0
    """The number of tokens in the caches."""


class PromptCache:
    """The keys and values of one text, a prompt with its continuation. A prompt that begins like this text is computed
    only from where they part. Pass the same one to each call of `generate`, `stream` or `lm.chat`:

        cache = lq.PromptCache()
        lq.generate(lm, text, prompt_cache=cache)  # reads the text, and writes on
        lq.generate(lm, text + more, prompt_cache=cache)  # reads `more`

    Each call replaces what is held. It is not used by another model, nor where there is more to read anew than is held,
    nor where RoPE depends on the length of a text. Layers with a window forget what is older, so that a prompt that
    parts from a text longer than the window before its end is read whole. At near-ties tokens may be others than
    without a cache, because keys were computed in passes of other lengths.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Free what is held."""
        self.held = Held()

    def begins(self, lm: LanguageModel, prompt: list[int]) -> tuple[int, Caches]:
        """(the number of the prompt's tokens that need not be computed, the caches of these). The last token, which
        tells the next one, is not among them."""
        held = self.held  # another thread may replace it meanwhile
        if held.lm is not lm or lm.model.rotates_by_length:
            return 0, ()
        pairs = zip(held.tokens, prompt[:-1], strict=False)
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        count = min(len(held.tokens), len(prompt) - 1) if same is None else same
        return (count if all(_goes_back(cache, held.read, count) for cache in held.caches) else 0), held.caches

    def keep(self, lm: LanguageModel, prompt: list[int], state: DecodeState) -> None:
        """Hold the text of a state's only row. Of one that an interrupted step has used up nothing can be held."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            self.forget()
            return
        tokens, length, read = to_host((state.tokens[0], state.lengths[0], state.positions[0]))
        # The newest token is not read yet: its position is the number of those that are.
        self.held = Held(lm, [*prompt, *tokens[:length].tolist()][:read], state.caches, read)


def _goes_back(cache: Any, read: int, count: int) -> bool:
    """Whether a cache of `read` tokens still holds what the token after the first `count` sees."""
    if isinstance(cache, RingCache):
        return count >= read - 1 or read <= cache.slots
    return count == read or isinstance(cache, FullCache | LatentCache)
