"""Errors of the library, told in the names of a command's options."""

import contextlib
import re
from collections.abc import Iterator

from llmq_jax.command_line import option_name
from llmq_jax.errors import BadInput


@contextlib.contextmanager
def named_as_options(*same: str, **others: str) -> Iterator[None]:
    """BadInput raised within it in the options' names: "beta=-1 must be" is "--beta is -1 and must be". Fields, with or
    without the name of a config's class before them, are called as options, but for `others`: {field: the option's}."""
    names = {**dict(zip(same, same, strict=True)), **others}
    named = rf"\b(?:\w+Config\.)?({'|'.join(names)})\b(?:=('?)([^\s',;]+)\2( must)?)?"

    def option(found: re.Match[str]) -> str:
        name, value, must = option_name(names[found[1]]), found[3], found[4]
        return name if value is None else f"{name} is {value} and{must}" if must else f"{name} {value}"

    try:
        yield
    except BadInput as error:
        error.args = (re.sub(named, option, str(error)),)  # it may be of a class of its own
        raise
