"""Cutting long documents where a cut cannot change their tokens.

Hugging Face's `tokenizers` needs about 130 bytes of memory for each character of the text it is given, and encodes one
text on one core: a book of 100 MB has to be cut first. At a line break between two visible characters, byte-level
tokenizers (GPT-2, Llama 3, Qwen, DeepSeek, SmolLM) always begin a new word, and tokens never cross words. Others
(SentencePiece-like ones put a space before the text, or treat it as one word) get their documents whole.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

UNICODE_FORMS = ("NFC", "NFKC", "NFD", "NFKD")
# One or more of every kind of character that patterns tell apart: letters, digits, marks, signs.
KINDS = ("a", "A", "don't", "1", "é", "e\u0301", "中", "🙂", *"/.,:;!?'\"`~@#$%^&*()[]{}<>-_+=|\\")
_LONE_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


def may_cut_at_line_breaks(tokenizer: dict[str, Any], pre_tokenizer: Any) -> bool:
    """Whether no token of a tokenizer spans a line break between visible characters, by its tokenizer.json (read as a
    dict) and by trying its pre-tokenizer."""
    described = tokenizer.get("pre_tokenizer") or {}
    steps = described.get("pretokenizers", [described])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    prefixed = any(step.get("add_prefix_space", True) for step in byte_level)
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "NFC")
    # Added tokens are found before the text is split; these take in a line break.
    swallowed = any(
        not token.get("special") and (token.get("lstrip") or "\n" in token["content"])
        for token in tokenizer.get("added_tokens", [])
    )
    # Without merges (the files of ByteTokenizer) every byte is a token, however the text is split.
    splits = tokenizer.get("model", {}).get("merges") == [] or _splits_after_line_breaks(pre_tokenizer)
    return bool(byte_level) and not prefixed and normalizer in UNICODE_FORMS and not swallowed and splits


def _splits_after_line_breaks(pre_tokenizer: Any) -> bool:
    """Whether a word always ends with the line break, whatever stands on either side. (With patterns such as o200k's a
    word may go on after it, with a slash.)"""
    if pre_tokenizer is None:
        return False
    for before, after in itertools.product(KINDS, KINDS):
        words = pre_tokenizer.pre_tokenize_str(f"{before}\n{after}")
        end = len(before) + 1
        if any(start < end < stop for _, (start, stop) in words):
            return False
    return True


def cut_at_line_breaks(text: str, length: int) -> Iterator[str]:
    """Pieces of `length` characters or more, cut after lone line breaks; joined, they are the text."""
    start = 0
    while start < len(text):
        found = _LONE_LINE_BREAK.search(text, start + length)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end
