"""Options of commands, as fields of dataclasses: what a field may say of its option, and what follows from its name."""

import contextlib
import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import tyro
from docstring_parser import parse_from_object
from tyro.conf import Positional as Positional

from llmq_jax.errors import BadInput

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""A bool that is off unless its option is given."""
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
"""Strings, one for each time that the option is given."""
IDLE = "idle"  # in the metadata of a field: why its option would have no effect
PATHS = {
    *("out", "model", "source", "target", "run", "others", "init_from", "branch_from", "draft", "reference"),
    *("data", "validation_data", "test_data", "replay_data", "file", "prompt_file", "include_path", "options"),
    *("tokenizer", "chat_template", "base"),
}
"""Fields whose texts may be paths: a ~ at their beginning is the home directory, also where a shell leaves it alone, as
in --out=~/x and in a file of options."""


def default_is(text: str, metavar: str | None = None) -> Any:
    """For `Annotated[int | None, default_is("the model's")] = None`: what the help text says in place of the default
    None or "". `metavar` is how a value is shown there, where its type does not tell."""
    return tyro.conf.arg(
        metavar=metavar, help_behavior_hint=lambda value: f"(default: {text if value in ('None', '') else value})"
    )


def no_option(why: str) -> Any:
    """For an inherited field that a command has no use for: it is always None, and its option is not in the help. If
    the option is given, the error says why it would have no effect."""
    return dataclasses.field(default=None, init=False, metadata={IDLE: why})


def option_name(field: str) -> str:
    """ "--batch-size" for the field `batch_size`."""
    return "--" + field.replace("_", "-")


def with_breaks(text: str) -> str:
    r"""A text of the command line, in which \n and \t, as a shell leaves them, become the line break and the tab, and
    two backslashes one."""
    meant = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: meant[found[1]], text)


def refuse_idle(options: Any, cases: Iterable[tuple[str, Any, str]]) -> None:
    """BadInput for an option that is given where it can do nothing. Cases: (field, whether it is idle, why)."""
    for name, idle, why in cases:
        value = getattr(options, name)
        if idle and value is not None and value is not False:  # 0 is given, though it equals False
            raise BadInput(f"{option_name(name)} has no effect {why}; leave it out")


def require_at_least(options: Any, **least: int) -> None:
    """BadInput for an option that is given, and is below its least value."""
    for name, bound in least.items():
        if (value := getattr(options, name)) is not None and value < bound:
            raise BadInput(f"{option_name(name)} is {value} and must be at least {bound}")


def at_home(field: str, value: Any) -> Any:
    """The value of a field; of one in `PATHS` with the home directory in the place of a leading ~."""
    if field not in PATHS:
        return value
    if isinstance(value, tuple):
        return tuple(at_home(field, each) for each in value)
    return os.path.expanduser(value) if isinstance(value, str) else value


def given_fields(options: type) -> list[dataclasses.Field[Any]]:
    """The fields whose options can be given: all but those of `no_option`."""
    return [field for field in dataclasses.fields(options) if field.init]


def fields_and_hints(options: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields whose options can be given, and their annotations including tyro's."""
    hints = typing.get_type_hints(options, include_extras=True)
    return [(field, hints[field.name]) for field in given_fields(options)]


def help_texts(options: type) -> dict[str, str]:
    """{field: its docstring}, in one line: tyro fills it to the terminal's width."""
    fields = [field for each in reversed(options.__mro__[:-1]) for field in parse_from_object(each).params]
    return {field.arg_name: " ".join((field.description or "").split()) for field in fields}


def without_names(options: type) -> list[str]:
    """The fields that are given without an option's name."""
    positional: Any = Positional[str]
    (marker,) = positional.__metadata__
    return [field.name for field, hint in fields_and_hints(options) if marker in getattr(hint, "__metadata__", ())]


def text_options(options: type) -> set[str]:
    """Names of the options that take one text."""
    hints = typing.get_type_hints(options)
    return {option_name(name) for name, hint in hints.items() if hint in (str, str | None, tuple[str, ...])}


@contextlib.contextmanager
def named_as_options(*same: str, **others: str) -> Iterator[None]:
    """BadInput raised within it in the options' names: "beta=-1 must be" is "--beta is -1 and must be". The options of
    the fields `same` have the fields' names; `others` is {field: the field of its option}. The name of a config's class
    may stand before a field."""
    names = {name: name for name in same} | others
    named = rf"(?<![\w.])(?:\w+Config\.)?({'|'.join(names)})\b(?:=('?)([^\s',;]+)\2( must)?)?"

    def option(found: re.Match[str]) -> str:
        name, value, must = option_name(names[found[1]]), found[3], found[4]
        return name if value is None else f"{name} is {value} and{must}" if must else f"{name} {value}"

    try:
        yield
    except BadInput as error:
        error.args = (re.sub(named, option, str(error)),)  # it may be of a class of its own
        raise
