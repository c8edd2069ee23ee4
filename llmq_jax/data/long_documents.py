"""Cutting long documents where it cannot change their tokens.

Hugging Face's `tokenizers` needs about 130 bytes of memory for each character of the text it is given, and encodes one
text on one core: a book of 100 MB has to be cut first. At a line break between two visible characters, byte-level
tokenizers (GPT-2, Llama 3, Qwen, DeepSeek, SmolLM) always begin a new word, and tokens never cross words. Others
(SentencePiece-like ones put a space before the text, or treat it as one word) get their documents whole.
"""

import re
from collections.abc import Iterator
from typing import Any

_LONE_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


def may_cut_at_line_breaks(tokenizer: dict[str, Any]) -> bool:
    """Whether no token of the tokenizer that this tokenizer.json describes spans a line break among letters."""
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    # ByteLevel splits by GPT-2's pattern unless told not to; then a Split by a pattern of that family stands before.
    # Without merges (our bytes) every byte is a token whatever the splits.
    splits = (
        any(step.get("use_regex", True) for step in byte_level)
        or any(step.get("type") == "Split" and "Regex" in step.get("pattern", {}) for step in steps)
        or tokenizer.get("model", {}).get("merges") == []
    )
    prefixed = any(step.get("add_prefix_space", True) for step in byte_level)
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "NFC")
    return bool(byte_level) and splits and not prefixed and normalizer in ("NFC", "NFKC", "NFD", "NFKD")


def cut_at_line_breaks(text: str, length: int) -> Iterator[str]:
    """Pieces of `length` characters or more, cut after lone line breaks; joined, they are the text."""
    start = 0
    while start < len(text):
        found = _LONE_LINE_BREAK.search(text, start + length)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end
