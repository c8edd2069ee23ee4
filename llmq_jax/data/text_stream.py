"""Token ids, one at a time, to text: what streaming and stop strings are built on."""

import itertools
from collections.abc import Sequence
from typing import SupportsIndex

from llmq_jax.data.tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class TextStream:
    """Turns token ids, one at a time, into text as soon as it is certain. It holds back an incomplete character, and a
    run of byte tokens until it ends: see `Tokenizer.byte_tokens`.

    The pieces that `push` and `finish` return, joined, are `decode_behind(tokenizer, behind, all ids)`. However long
    the text is, a token is decoded a few times.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False, behind: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # The last token that gave a piece, and those after it. The next piece is decoded together with that token:
        # SentencePiece decoders drop a leading space at the beginning of a text, so no piece may be decoded alone.
        self._ids = list(behind)
        self._shown = len(self._decode(self._ids))  # characters of their text that are in pieces already

    def push(self, token: SupportsIndex) -> str:
        """Text that became certain with this token; often one word, sometimes nothing."""
        number = int(token)
        self._ids.append(number)
        alone = self._decode([number])
        # A token without a text of its own, such as a skipped special token, may stand within a run of byte tokens.
        if not alone or number in self._tokenizer.byte_tokens:
            return ""
        text = self._decode(self._ids)
        certain = len(text) - text.endswith(REPLACEMENT)  # an incomplete character at the end is decoded as one
        piece = text[self._shown : certain]
        if piece:
            # An incomplete character, if any, begins within this token: otherwise this token would give no piece.
            self._ids = [number]
            self._shown = len(alone) - (len(text) - certain)
        return piece

    def held(self) -> str:
        """The text held back, which `finish` would return, or "" if it ends with an incomplete character. Decodes all
        of it anew."""
        text = self._decode(self._ids)[self._shown :]
        return "" if text.endswith(REPLACEMENT) else text

    def finish(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        text = self._decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def decode_behind(
    tokenizer: Tokenizer, behind: Sequence[int], ids: Sequence[int], *, skip_special_tokens: bool = False
) -> str:
    """The text of `ids` where it follows that of `behind`. Decoded alone it may lack its leading space, which
    SentencePiece decoders (Llama 2, Mistral) drop at the beginning of a text."""
    whole, before = (
        tokenizer.decode(each, skip_special_tokens=skip_special_tokens) for each in ([*behind, *ids], behind)
    )
    return whole[len(before) :]


def last_text(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, ...]:
    """The last id, as a tuple, that has a text of its own, so that others may be decoded behind it. Special tokens and
    parts of a character do not count: what follows could change their text. Where there is no such id, the first one in
    the vocabulary; () where that has none either."""
    for token in itertools.chain(reversed(ids), range(tokenizer.vocab_size)):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if text and REPLACEMENT not in text:
            return (token,)
    return ()
