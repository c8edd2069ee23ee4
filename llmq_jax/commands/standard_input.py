"""Standard input, as `llmq chat` reads it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from llmq_jax.errors import BadInput


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
        raise BadInput(f"standard input is not UTF-8 ({error.reason}): convert it to UTF-8") from None
