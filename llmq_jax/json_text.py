"""JSON from other people's files, in which every fault is a ValueError."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value that a text spells. ValueError, most often its subclass json.JSONDecodeError: it is no JSON, not UTF-8,
    nested more deeply than Python can follow, or has an integer of thousands of digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
