"""Where tokens stand in their text. Masks are made from this, since a token may hold the end of one part and the
beginning of the next."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

Span = tuple[int, int]
"""Characters from the first number up to, not including, the second."""


def byte_offsets(text: str, lengths: Sequence[int]) -> Int[np.ndarray, "N 2"]:
    """Characters [start, end) of the tokens that split a text's UTF-8 into pieces of `lengths` bytes.

    A character that is split over several tokens belongs to each of them.
    """
    # The character of each byte: bytes 10xxxxxx continue one, all others begin one.
    content = np.frombuffer(text.encode("utf-8"), np.uint8)
    character = np.cumsum((content & 0xC0) != 0x80) - 1
    ends = np.cumsum(np.asarray(lengths, np.int64))
    starts = ends - np.asarray(lengths, np.int64)
    if len(ends) == 0:
        return np.zeros((0, 2), np.int64)
    return np.stack([character[starts], character[ends - 1] + 1], axis=1).astype(np.int64)


def overlaps(offsets: Int[np.ndarray, "N 2"], spans: Sequence[Span]) -> Bool[np.ndarray, " N"]:
    """Which tokens hold at least one character of at least one span.

    A token without characters, which the tokenizer put there, counts as part of the character that follows it.
    """
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    held = np.zeros(len(offsets), bool)
    for start, end in spans:
        held |= (starts < end) & (ends > start)
    return held
