"""Command lines from dataclasses: options, help text and one-line errors for every command of the project.

A command is a function `main(options)` whose only parameter is annotated with a frozen dataclass. Its fields are the
options (`batch_size` is `--batch-size`), their docstrings the help text, their defaults the defaults; a field with
`Positional` is an argument without a name. tyro (https://brentyi.github.io/tyro) turns the dataclass into a parser.

Whatever a user can get wrong ends in one line on stderr, `error: what, where, what to do`, and exit code 2.

Here a command is run. What a field may say of its option is in `options.py`, arguments and help texts are read and
written in `option_parser.py`, and what is wrong with arguments is told in `option_errors.py`.

Nothing here imports JAX before the options are read, so that help and errors come at once.
"""

import codecs
import importlib
import io
import itertools
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import tyro

from llmq_jax.atomic_files import full_disk
from llmq_jax.errors import BAD_INPUT, BadInput, PythonAdvice, did_you_mean
from llmq_jax.option_parser import FILE, HELP, join_texts, options_of_file, parse, values_by_field

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def run(
    command: Callable[..., Any] | Mapping[str, str],
    arguments: Sequence[str] | None = None,
    program: str | None = None,
    defaults: Callable[[dict[str, str]], Any] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> NoReturn:
    """Read the arguments (`sys.argv` by default), run the command with them, and exit.

    `command` is a function of one options dataclass, which may return an exit code (an int), or a table from verb to
    the name of the module whose `main` is such a function. `defaults` serves presets: given what follows each option on
    the command line, it returns the options instance that explicit options are laid over, and that `--help` shows.
    `elsewhere` is {a verb that there is not: what to do instead}.

    Exit codes: 0, 2 for bad input, 130 when interrupted from the keyboard, 141 when the reader of the output has gone.
    Any other exception is a fault of ours and keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    program = program or _program_name()
    _open_streams()
    warnings.formatwarning = _warning
    warnings.simplefilter("ignore", PythonAdvice)
    of_file: dict[str, list[str]] = {}
    try:
        try:
            if isinstance(command, Mapping):
                command, arguments, program = _choose_verb(command, arguments, program, elsewhere or {})
            options = _options_class(command)
            arguments = join_texts(options, arguments)
            of_file = options_of_file(options, arguments)
            arguments = [*itertools.chain.from_iterable(of_file.values()), *arguments]
            default = defaults(values_by_field(arguments)) if defaults else tyro.MISSING_NONPROP
            result = command(parse(options, arguments, program, default))
            code = result if isinstance(result, int) else 0
            sys.stdout.flush()
        except SystemExit:  # as after --help
            sys.stdout.flush()
            raise
        except BaseException:
            try:
                sys.stdout.flush()
            except OSError:  # what ended the command is told
                _discard_output()
            raise
    except BadInput as error:
        said = " ".join(str(error).split())
        if said.partition(" ")[0] in of_file:
            said = f"{values_by_field(arguments)[FILE]}: {_spelled_as_in_file(said, of_file)}"
        print("error:", said, file=sys.stderr)
        code = BAD_INPUT
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone
            _discard_output()
            code = BROKEN_PIPE
        elif error.filename is not None:  # no permission, disk full, a folder where a file is needed, ...
            print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
            code = BAD_INPUT
        elif (full := full_disk(error)) is not None:  # what this project writes elsewhere is named
            _discard_output()
            print(f"error: {full}: standard output, or a library's file", file=sys.stderr)
            code = BAD_INPUT
        else:
            raise
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _spelled_as_in_file(said: str, of_file: Mapping[str, Any]) -> str:
    """A message with the keys of the file in place of the options that it gives."""

    def spelled(option: re.Match[str]) -> str:
        return option[1].replace("-", "_") if option[0] in of_file else option[0]

    return re.sub(r"--([a-z][\w-]*)", spelled, said)


def _open_streams() -> None:
    """Put an empty stream in the place of one that was closed (>&-), and let no letter end a run: a terminal or a file
    that is not in UTF-8 gets those that it has no bytes for spelled out."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (closed by the interpreter)
    codecs.register_error("as_in_json", _as_in_json)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="as_in_json")


def _as_in_json(error: UnicodeError) -> tuple[str, int]:
    r"""Characters as \u and four digits, as JSON has them, so that a line of JSON with them stays one. Beyond U+FFFF
    these are two; Python's own "backslashreplace" writes others."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return re.sub("....", r"\\u\g<0>", units), error.end


def _discard_output() -> None:
    """The interpreter must not complain when it flushes what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_python_warning = warnings.formatwarning


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A UserWarning as one line, without the place in the code, which only developers need."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _python_warning(message, category, filename, lineno, line)


def _program_name() -> str:
    """The command as the user types it: "llmq", or "python -m train.pretrain"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else os.path.basename(sys.argv[0])


def _choose_verb(
    verbs: Mapping[str, str], arguments: list[str], program: str, elsewhere: Mapping[str, str]
) -> tuple[Callable[..., Any], list[str], str]:
    """(the verb's main function, the arguments after it, the program's name with it). `elsewhere` as in `run`."""
    verb = arguments[0] if arguments else "--help"
    if verb == "help" and arguments[1:]:
        arguments = [arguments[1], "--help"]
        verb = arguments[0]
    if verb in {"help", *HELP}:
        print(f"usage: {program} COMMAND [OPTIONS]\n")
        width = max(map(len, verbs))
        for name, module in verbs.items():
            print(f"  {name:{width}}  {(importlib.import_module(module).__doc__ or '').strip().splitlines()[0]}")
        print(f"\nThe options of a command: {program} COMMAND --help")
        sys.exit(0)
    if verb == "--version":
        from importlib.metadata import version

        print(program, version("llmq_jax"))
        sys.exit(0)
    if verb not in verbs:
        meant = elsewhere.get(verb) or did_you_mean(verb, verbs)
        raise BadInput(f"unknown command {verb!r} for {program}: {meant}")
    return importlib.import_module(verbs[verb]).main, arguments[1:], f"{program} {verb}"


def _options_class(command: Callable[..., Any]) -> type:
    hints = typing.get_type_hints(command)
    hints.pop("return", None)
    options: type
    (options,) = hints.values()
    return options
