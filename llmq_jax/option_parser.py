"""From arguments to an instance of a command's options, and its help text, by tyro."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
import typing
from typing import Any

import tyro

from llmq_jax.errors import BadInput
from llmq_jax.option_errors import check_names, one_line
from llmq_jax.options import (
    IDLE,
    PATHS,
    at_home,
    fields_and_hints,
    help_texts,
    option_name,
    text_options,
    without_names,
)

DESCRIPTION = "DESCRIPTION OF THE COMMAND"  # its placeholder in what tyro prints
FILE = "options"  # the field that names a file of further options, in a dataclass that has it
HELP = {"-h", "--help"}


def join_texts(options: type, arguments: list[str]) -> list[str]:
    """`--prompt "- a"` as `--prompt=- a`: a text may begin with a hyphen where it does not look like an option."""
    texts = text_options(options)
    joined: list[str] = []
    for argument in arguments:
        is_text = argument.startswith("-") and not re.fullmatch(r"-h|--(\w[\w-]*(=.*)?)?", argument)
        if is_text and joined and joined[-1].replace("_", "-") in texts:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def values_by_field(arguments: list[str]) -> dict[str, str]:
    """What follows each option, by the name of its field: "" where nothing does. The last one counts."""
    given = {}
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            value = value if equals else "" if following.startswith("--") else following
            given[name.removeprefix("--").replace("-", "_")] = value
    return given


def options_of_file(options: type, arguments: list[str]) -> dict[str, list[str]]:
    """{option: arguments} of the file that `--options` names, without the options that the arguments give."""
    kinds = {field.name: str | None for field in dataclasses.fields(options) if IDLE in field.metadata}
    kinds |= {field.name: hint for field, hint in fields_and_hints(options)}
    given = values_by_field(arguments)
    if FILE not in kinds or FILE not in given:
        return {}
    from llmq_jax.option_files import read_options

    del kinds[FILE]
    try:
        if not given[FILE]:
            raise BadInput(f"{option_name(FILE)} needs a file: give its name, or leave the option out")
        found = read_options(at_home(FILE, given[FILE]), kinds, {name.removeprefix("no_") for name in given})
    except (BadInput, OSError):
        if HELP & set(arguments):
            return {}
        raise
    return {option_name(name): values for name, values in found.items()}


def parse(options: type, arguments: list[str], program: str, default: Any) -> Any:
    """An instance of the options from the arguments; BadInput for what cannot be understood, exit after `--help`."""
    check_names(options, arguments, program)
    shown = _in_groups(options)
    if isinstance(default, options):
        default = _grouped(shown, default)
    said, complained = _Caught(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            parsed = tyro.cli(
                shown,
                prog=program,
                # tyro would re-flow our description by its own rules.
                description=DESCRIPTION,
                args=arguments,
                default=default,
                config=(tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName),
            )
    except SystemExit as exit:
        if exit.code:
            raise BadInput(one_line(complained.getvalue(), options, arguments, program)) from None
        print(said.text().replace(DESCRIPTION, _description(options), 1), end="")
        raise
    given = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    _refuse_empty_paths(options, given)
    return options(**{name: at_home(name, value) for name, value in given.items()})


def _refuse_empty_paths(options: type, given: dict[str, Any]) -> None:
    """An empty path would be the current folder, one of spaces a folder that nobody finds."""
    bare = without_names(options)
    for name, value in given.items():
        paths = value if isinstance(value, tuple) else (value,)
        if name in PATHS and any(isinstance(path, str) and not path.strip() for path in paths):
            shown = name.upper() if name in bare else option_name(name)
            raise BadInput(f"{shown} is empty, as from a shell variable that is not set; give a path or a name")


@functools.cache  # it reads the classes' source, which takes longer than the arguments: tests run hundreds of commands
def _in_groups(options: type) -> type:
    """A dataclass of dataclasses, one for the options that each class declares: tyro shows each in a box of its own.
    The box of `LoggingOptions` is headed "logging options", that of the command's own class "options".
    """
    texts = help_texts(options)
    declared_by: dict[str, type] = {}
    for ancestor in reversed(options.__mro__[:-1]):
        declared_by = {**dict.fromkeys(inspect.get_annotations(ancestor), ancestor), **declared_by}
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for field, hint in fields_and_hints(options):
        # Without prefix_name=False it would be --optimizer.learning-rate.
        shown = tyro.conf.arg(help=texts.get(field.name, ""), prefix_name=False)
        kept = {name: getattr(field, name) for name in ("default", "default_factory", "kw_only")}
        declaring = declared_by[field.name]
        words = [] if declaring is options else re.findall("[A-Z][a-z]*", declaring.__name__.removesuffix("Options"))
        group = groups.setdefault("_".join(words).lower(), [])
        group.append((field.name, typing.Annotated[hint, shown], dataclasses.field(**kept)))
    boxes: list[tuple[str, Any]] = []
    for name, fields in groups.items():
        box = dataclasses.make_dataclass(name or "options", fields, frozen=True)
        # help="": for a box without, tyro would look through the source of a module that does not have the class.
        boxes.append((box.__name__, typing.Annotated[box, tyro.conf.arg(name=name.replace("_", " "), help="")]))
    return dataclasses.make_dataclass(options.__name__, boxes, frozen=True)


def _grouped(shown: type, options: Any) -> Any:
    """An instance of what `_in_groups` made of the options' class."""
    groups = {}
    for group in dataclasses.fields(shown):
        kind = typing.get_args(group.type)[0]
        groups[group.name] = kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})
    return shown(**groups)


class _Caught(io.TextIOWrapper):
    """Catches what tyro prints, with the colours and frames that standard output supports, where it is shown later."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding=sys.stdout.encoding)
        self.on_terminal = sys.stdout.isatty()

    def isatty(self) -> bool:
        return self.on_terminal

    def text(self) -> str:
        self.seek(0)
        return self.read()


def _description(options: type) -> str:
    """The docstring of the options' class or, where that is only the signature that a dataclass generates, that of its
    module.

    Prose is filled to the terminal's width; indented lines, which are commands, and lists stay as they are where they
    fit.
    """
    own = options.__doc__ or ""
    of_module = sys.modules[options.__module__].__doc__ or ""
    text = inspect.cleandoc(of_module if own.startswith(f"{options.__name__}(") else own)
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(" ".join(lines), width) if is_prose else "\n".join(_fitted(line, width) for line in lines)
        for is_prose, lines in itertools.groupby(text.splitlines(), _is_prose)
    )


def _fitted(line: str, width: int) -> str:
    """A command that is wider than the terminal in several lines: its note above it, and its options below."""
    if len(line) <= width or not line.startswith("    "):
        return line
    command, _, note = line.strip().partition("   ")
    lines = ["    # " + note.strip()] if note else []
    lines.append("   ")
    for word in re.split(r" (?=--)", command):
        if lines[-1].strip() and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append("       ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def _is_prose(line: str) -> bool:
    return bool(line) and not line[0].isspace() and not line.startswith("- ")
