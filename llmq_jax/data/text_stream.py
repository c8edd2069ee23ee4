"""Token ids, one at a time, to text: what streaming and stop strings are built on."""

import itertools
from collections.abc import Sequence
from typing import SupportsIndex

from llmq_jax.data.tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class TextStream:
    """Turns token ids, one at a time, into text as soon as it is certain. Held back are half a character, and a run of
    byte tokens up to its end: see `Tokenizer.byte_tokens`.

    The pieces that `push` and `finish` return, joined, are `decode_behind(tokenizer, behind, all ids)`. However long
    the text is, a token is decoded a few times.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False, behind: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # The last token that gave a piece, and those after it. The next piece is decoded behind it: SentencePiece-like
        # decoders drop a leading space when a text begins, so a piece must not be decoded as if it began one.
        self._ids = list(behind)
        self._shown = len(self._decode(self._ids))  # characters of their text that are in pieces already

    def push(self, token: SupportsIndex) -> str:
        """Text that became certain with this token; often one word, sometimes nothing."""
        number = int(token)
        self._ids.append(number)
        alone = self._decode([number])
        # A token without a text of its own, as a special one that is skipped, may stand within a run of byte tokens.
        if not alone or number in self._tokenizer.byte_tokens:
            return ""
        text = self._decode(self._ids)
        certain = len(text) - text.endswith(REPLACEMENT)  # half a character at the end is one of these
        piece = text[self._shown : certain]
        if piece:
            # The half a character, if any, begins within this token: an earlier one that went on would give no piece.
            self._ids = [number]
            self._shown = len(alone) - (len(text) - certain)
        return piece

    def held(self) -> str:
        """What is held back, if it ends with a whole character: `finish` would return it. Decodes all of it anew."""
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
    """The text of ids as it stands behind that of others. SentencePiece-like decoders, as Llama 2's and Mistral's, drop
    a leading space, as if a text began there."""
    whole, before = (
        tokenizer.decode(each, skip_special_tokens=skip_special_tokens) for each in ([*behind, *ids], behind)
    )
    return whole[len(before) :]


def last_text(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, ...]:
    """Of the ids of a text the last that has a text of its own, which others may be decoded behind: none of a special
    token, of half a character, or of a byte, which those behind it could change. Where there is none, the first of the
    vocabulary, and () where that has none either."""
    for token in itertools.chain(reversed(ids), range(tokenizer.vocab_size)):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if text and REPLACEMENT not in text and token not in tokenizer.byte_tokens:
            return (token,)
    return ()
