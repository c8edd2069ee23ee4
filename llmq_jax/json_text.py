"""JSON from other people's files, in which every fault is a ValueError."""

import json
from typing import Any

DEEPEST = 100
"""Lists and objects within each other. Parsers read thousands, but what walks through the value may then fail."""


def parse_json(text: str | bytes) -> Any:
    """The value that a text spells. ValueError, most often its subclass json.JSONDecodeError: it is no JSON, not UTF-8,
    nested more than `DEEPEST` deep, or has an integer of thousands of digits."""
    try:
        value = json.loads(text)
        begun = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
        if begun > DEEPEST and _is_deeper(value):
            raise RecursionError
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def half_surrogate(text: str) -> int | None:
    """Where half a surrogate pair stands in a text: JSON can spell it (\\ud800), but it is no character, and UTF-8 has
    no bytes for it. None: nowhere."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return error.start
    return None


def _is_deeper(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inside for item in items if isinstance(item, list | dict)]
    return bool(level)
