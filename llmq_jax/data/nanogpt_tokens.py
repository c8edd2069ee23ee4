"""Text that nanoGPT has tokenised: a folder with `train.bin` and, mostly, `val.bin`.

Each is a stream of little-endian uint16 without a header (karpathy/nanoGPT, `data/*/prepare.py`). Nothing there names
the tokenizer, except for tokens that are characters: their table is pickled beside them (`meta.pkl`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput

TRAINING, VALIDATION, CHARACTERS = "train.bin", "val.bin", "meta.pkl"
PIECE = 1 << 22
"""Tokens that are read at a time: 8 MiB."""
READ_AS_TEXT = 2000
"""Tokens at the beginning that are decoded, to check the tokenizer by them."""


@dataclass(frozen=True, eq=False)
class NanoGPTTokens:
    """The streams of such a folder, mapped from their files."""

    folder: Path
    training: np.ndarray
    """[N] uint16."""
    validation: np.ndarray | None
    """[M], or None."""

    def text_of_beginning(self, tokenizer: Tokenizer) -> str:
        """The text of the first tokens. BadInput where the tokenizer does not encode it as these tokens."""
        ids = self.training[:READ_AS_TEXT]
        if ids.max() < tokenizer.vocab_size:
            text = tokenizer.decode(ids)
            # The cut may change the last tokens of the piece: compare the first half.
            surely = max(1, len(ids) // 2)
            if tokenizer.encode(text, allow_special=True)[:surely] == ids[:surely].tolist():
                return text
        raise BadInput(
            f"{self.folder / TRAINING} does not begin with tokens as {tokenizer.name} makes them; name the tokenizer "
            "that did, or prepare the text itself"
        )

    def separated(self, tokenizer: Tokenizer) -> bool:
        """Whether the end-of-text token stands between documents."""
        return any((piece == tokenizer.end_of_text).any() for piece in pieces(self.training))


def is_nanogpt_folder(path: str | Path) -> bool:
    return Path(path, TRAINING).is_file()


def read_nanogpt_tokens(folder: str | Path) -> NanoGPTTokens:
    """BadInput: tokens of characters, an empty file, or one of an odd number of bytes."""
    folder = Path(folder)
    if (folder / CHARACTERS).exists():
        raise BadInput(f"{folder} holds tokens of characters (by its {CHARACTERS}); prepare the text itself")
    has_validation = (folder / VALIDATION).exists()
    return NanoGPTTokens(folder, _stream(folder / TRAINING), _stream(folder / VALIDATION) if has_validation else None)


def pieces(stream: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(stream), PIECE):
        yield stream[start : start + PIECE]


def _stream(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if not size or size % 2:
        raise BadInput(f"{path} has {size:,} bytes, which are no tokens of two bytes each; copy it again")
    return np.memmap(path, np.dtype("<u2"), "r")
