"""Standard input: as a whole, where a command takes - for it, and line by line, as `llmq chat` reads it."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from llmq_jax.errors import BadInput
from llmq_jax.json_text import parse_json

STANDARD_INPUT = "standard input"
"""What errors call it."""


def whole_input() -> str:
    """All of it, as the same file by name would be read: UTF-8, without a byte order mark."""
    from llmq_jax.data.records import decoded

    return decoded(sys.stdin.buffer.read(), STANDARD_INPUT)


def text_of_input(file: str) -> str:
    """All of it as one text. BadInput: it is blank, or holds JSON that would be records in a .jsonl or .json file;
    `file` is how the command is given one, with {} for the end of its name."""
    from llmq_jax.data.records import is_blank

    text = whole_input()
    if is_blank(text):
        raise BadInput(f"{STANDARD_INPUT} holds no text")
    line = first_record(text)
    if (record := line or _record(text)) is not None:
        ending, held = (".jsonl", "lines of JSON") if line else (".json", "JSON")
        names, option = ", ".join(record), "" if "text" in record else " and --text-field"
        raise BadInput(
            f"{STANDARD_INPUT} is taken as one text, and holds {held} (fields found: {names}); give "
            f"{file.format(ending)}{option} instead, or a .txt file if the JSON is the text"
        )
    return text


def first_record(text: str) -> dict[str, Any] | None:
    """The object with fields that a text's first line is, as in a .jsonl file; None where it is none."""
    first = _parsed(text.lstrip().partition("\n")[0])
    return first if isinstance(first, dict) and first else None


def _record(text: str) -> dict[str, Any] | None:
    """The object with fields that a text is, or that begins the list that it is, as in a .json file."""
    whole = _parsed(text)
    first = whole[0] if isinstance(whole, list) and whole else whole
    return first if isinstance(first, dict) and first else None


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def without_last_break(text: str) -> str:
    """The text without its final line break, which editors and `echo` put there."""
    return re.sub(r"\r?\n\Z", "", text)


@contextlib.contextmanager
def standard_input() -> Iterator[None]:
    """Makes `input` read UTF-8, without a byte order mark, whatever the locale says (under C, Python lets any byte
    through); BadInput where that is not UTF-8.

    To be entered once: the encoding cannot be changed after something was read.
    """
    stream: Any = sys.stdin
    stream.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(f"{STANDARD_INPUT} is not UTF-8 ({error.reason}): convert it to UTF-8") from None
