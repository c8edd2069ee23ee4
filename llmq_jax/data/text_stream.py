"""Token ids, one at a time, to text: what streaming and stop strings are built on."""

from typing import SupportsIndex

from llmq_jax.data.tokenizers import Tokenizer


class TextStream:
    """Turns token ids, one at a time, into text as soon as it is certain: half a character is held back.

    The pieces that `push` and `finish` return, joined, are `tokenizer.decode(all ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Tokens already shown that the next piece is decoded with: SentencePiece-like decoders drop a leading space
        # when a text begins, so a piece must not be decoded as if it began one.
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token: SupportsIndex) -> str:
        """Text that became certain with this token; often one word, sometimes nothing."""
        self._held.append(int(token))
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        text = self._new_text()
        self._shown, self._held = [], []
        return text

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._shown, skip_special_tokens=self._skip)
        return self._tokenizer.decode(self._shown + self._held, skip_special_tokens=self._skip)[len(shown) :]
