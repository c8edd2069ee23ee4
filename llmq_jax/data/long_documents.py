"""Documents are encoded in blocks, and long ones cut where a cut cannot change their tokens.

Hugging Face's `tokenizers` needs about 130 bytes of memory for each character of the text it is given, and encodes one
text on one core: a book of 100 MB has to be cut first. Byte-level tokenizers (GPT-2, Llama 3, Qwen, DeepSeek, SmolLM)
part a text into words, and tokens never cross words. At some white space, which differs between them, a word ends
whatever stands on either side: each is tried at the places of CUTS. Others (SentencePiece-like ones put a space before
the text, or treat it as one word) get their documents whole.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

BLOCK_CHARACTERS = 2**20
"""Documents are encoded in blocks of about this many characters, which bounds memory and feeds all cores."""

UNICODE_FORMS = ("NFC", "NFKC", "NFD", "NFKD")
CUTS = (
    r"(?<=\S)(?=[ \t])",  # before spaces
    r"(?<=\S)(?=[\r\n])",  # before line breaks: not with Llama 3, whose signs take them in
    r"(?<=[\r\n])(?=\S)",  # after line breaks: not with GPT-2, for which the last of several is a word of its own
)
"""Where a document may be cut. White space is spelled out: Python counts characters as such that tokenizers do not."""
GPT2_CUTS = re.compile("|".join(CUTS[:2]))
# One or more of every kind of character that patterns tell apart: letters, digits, marks, signs; and white space.
KINDS = ("a", "A", "don't", "1", "é", "e\u0301", "中", "🙂", *"/.,:;!?'\"`~@#$%^&*()[]{}<>-_+=|\\")
GAPS = (" ", "\t", "\n", "\r", "  ", " \n", "\n ", "\n\n", "\r\n", "\n \n")


def places_to_cut(tokenizer: dict[str, Any], pre_tokenizer: Any) -> re.Pattern[str] | None:
    """Those of CUTS that no token of a tokenizer spans, by its tokenizer.json (read as a dict) and by trying its
    pre-tokenizer; None where there are none. Trying takes a fifth of a second."""
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    normalizers = {step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")}
    if not byte_level or not normalizers <= set(UNICODE_FORMS):
        return None
    # Added tokens are found before the text is split.
    tokens = [token for token in tokenizer.get("added_tokens", []) if not token.get("special")]
    cuts = [cut for cut in CUTS if not any(_takes_in(token, cut) for token in tokens)]

    @functools.cache
    def words(text: str) -> Any:
        found = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        # Without merges (the files of ByteTokenizer) every byte is a token, however the text is split.
        return "".join(found) if tokenizer.get("model", {}).get("merges") == [] else found

    for texts in itertools.product(KINDS, GAPS, KINDS):
        text = "".join(texts)
        for cut in tuple(cuts):
            for place in (found.start() for found in re.finditer(cut, text)):
                if words(text[:place]) + words(text[place:]) != words(text):
                    cuts.remove(cut)
                    break
    return re.compile("|".join(cuts)) if cuts else None


def _steps(described: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of others."""
    if described is None:
        return []
    if described["type"] == "Sequence":
        return [step for member in described[members] for step in _steps(member, members)]
    return [described]


def _takes_in(token: dict[str, Any], cut: str) -> bool:
    """Whether the cut may lie within an added token, or within white space that it takes from its neighbours."""
    before = "\n" if token.get("lstrip") else ""
    after = (" ", "\n") if token.get("rstrip") else ("",)
    return any(re.search(cut, f"{before}{token['content']}{end}") for end in after)


def pieces(text: str, length: int, cuts: re.Pattern[str] | None) -> Iterator[str]:
    """Pieces of `length` characters or more, cut at these places; joined, they are the text."""
    start = 0
    while start < len(text):
        found = cuts.search(text, start + length) if cuts else None
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end


def in_blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about BLOCK_CHARACTERS in all."""
    block, characters = [], 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def in_pieces(
    texts: Iterable[str],
    encode: Callable[[list[str]], Iterable[np.ndarray]],
    dtype: np.dtype,
    cuts: Callable[[], re.Pattern[str] | None],
) -> list[np.ndarray]:
    """Token ids of each text. Long texts are encoded in pieces, so that all cores work on a single text too."""
    parts, counts, length = [], [], BLOCK_CHARACTERS // 16
    for text in texts:
        cut = [text] if len(text) <= length else list(pieces(text, length, cuts()))
        parts.extend(cut)
        counts.append(len(cut))
    arrays = list(encode(parts))
    ends = np.cumsum(counts)
    return [_join(arrays[end - count : end], dtype) for end, count in zip(ends, counts, strict=True)]


def _join(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.zeros(0, dtype), *arrays])
