"""Standard input, as the commands read it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from llmq_jax.errors import BadInput


@contextlib.contextmanager
def standard_input() -> Iterator[TextIO]:
    """Standard input as UTF-8, whatever the locale says (under C, Python lets any byte through); BadInput where it is
    not UTF-8.

    To be entered once: the encoding cannot be changed after something was read.
    """
    stream: Any = sys.stdin
    stream.reconfigure(encoding="utf-8", errors="strict")
    try:
        yield sys.stdin
    except UnicodeDecodeError as error:
        raise BadInput(f"standard input is not UTF-8 ({error.reason}): convert it to UTF-8") from None
