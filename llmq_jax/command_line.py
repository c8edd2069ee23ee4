"""Command lines from dataclasses: options, help text and one-line errors for every command of the project.

A command is a function `main(options)` whose only parameter is annotated with a frozen dataclass. Its fields are the
options (`batch_size` is `--batch-size`), their docstrings the help text, their defaults the defaults; a field with
`Positional` is an argument without a name. tyro (https://brentyi.github.io/tyro) turns the dataclass into a parser.

Whatever a user can get wrong ends in one line on stderr, `error: what, where, what to do`, and exit code 2. tyro draws
its error messages as boxes of several lines: `_parse` catches them and `_one_line` turns them into one line.

Nothing here imports JAX before the options are read, so that help and errors come at once.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import io
import itertools
import os
import platform
import re
import shutil
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import docstring_parser
import tyro
from tyro.conf import Positional as Positional

from llmq_jax.atomic_files import full_disk
from llmq_jax.errors import BAD_INPUT, BadInput, did_you_mean
from llmq_jax.option_names import meant_by

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""A bool that is off unless its option is given."""
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
"""Strings, one for each time that the option is given."""

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE
KEPT_PROGRAMS_BYTES = 2**30  # beyond it, those that were not used for longest go
DESCRIPTION = "DESCRIPTION OF THE COMMAND"  # its placeholder in what tyro prints
SHORTEST_KEPT_SECONDS = 0.1  # of compilation: below, reading is no faster than compiling
FILE = "options"  # the field that names a file of further options, in a dataclass that has it
IDLE = "idle"  # in the metadata of a field: why its option would have no effect
HELP = {"-h", "--help"}
WITHOUT_NAME = {
    "prompt": "a text is given by --prompt",
    "prompt_file": "a file by --prompt-file",
    "text": "a text is given by --text",
    "data": "a file by --data",
    "system": "messages are typed or come from standard input, and a system text is given by --system",
}
"""{field: advice for a value that is given without an option's name, where the command has this field}."""
PATHS = {
    *("out", "model", "source", "target", "run", "others", "init_from", "branch_from", "draft", "reference"),
    *("data", "validation_data", "test_data", "replay_data", "file", "prompt_file", "include_path", "options"),
    *("tokenizer", "chat_template", "base"),
}
"""Fields whose texts may be paths: a ~ at their beginning is the home directory, also where a shell leaves it alone, as
in --out=~/x and in a file of options."""
KINDS = {"INT": "an integer", "FLOAT": "a number", "FLOAT FLOAT": "two numbers", "{True,False}": "True or False"}


def run(
    command: Callable[..., Any] | Mapping[str, str],
    arguments: Sequence[str] | None = None,
    program: str | None = None,
    defaults: Callable[[dict[str, str]], Any] | None = None,
) -> NoReturn:
    """Read the arguments (`sys.argv` by default), run the command with them, and exit.

    `command` is a function of one options dataclass, which may return an exit code (an int), or a table from verb to
    the name of the module whose `main` is such a function. `defaults` serves presets: given what follows each option on
    the command line, it returns the options instance that explicit options are laid over, and that `--help` shows.

    Exit codes: 0, 2 for bad input, 130 when interrupted from the keyboard, 141 when the reader of the output has gone.
    Any other exception is a fault of ours and keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    program = program or _program_name()
    _open_streams()
    warnings.formatwarning = _warning
    of_file: dict[str, list[str]] = {}
    try:
        try:
            if isinstance(command, Mapping):
                command, arguments, program = _choose_verb(command, arguments, program)
            options = _options_class(command)
            arguments = _join_texts(options, arguments)
            of_file = _of_file(options, arguments)
            arguments = [*itertools.chain.from_iterable(of_file.values()), *arguments]
            default = defaults(_given(arguments)) if defaults else tyro.MISSING_NONPROP
            result = command(_parse(options, arguments, program, default))
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
        words = str(error).split()
        if words and words[0] in of_file:
            words.insert(0, f"{_given(arguments)[FILE]}:")
        print("error:", *words, file=sys.stderr)
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


def use_device(device: Literal["auto", "cpu", "gpu"]) -> None:
    """Bind JAX to a kind of device, before its first use; BadInput when there is none of that kind.

    "auto" leaves the choice to JAX, which takes the fastest kind that it finds. What is compiled is kept from now on
    (`keep_programs`).
    """
    import jax

    settings: Any = jax.config
    keep_programs()
    # A CPU runs a program when it is called: a step that waits for the one before it would have its temporary memory
    # already, and training takes up to twice as much. Nothing is computed beside it on the same cores anyway.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if device == "auto":
        return
    before = settings.jax_platforms
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError):  # JAX has no such backend, could not start it, or (asserting) sees no GPU
        found = "none"
    if found != device:
        jax.config.update("jax_platforms", before)
        raise BadInput(
            f"--device {device}: JAX finds no {device.upper()} here; use --device cpu, or install JAX for your GPU: "
            f"pip install -e '.[cuda]'"
        )


def keep_programs() -> None:
    """Keep what JAX compiles for the next run of a command, unless JAX_COMPILATION_CACHE_DIR names a place already.

    A folder for each kind of processor: XLA's code for one may not run on another that shares the home directory.
    """
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "llmq_jax" / "programs" / _processor_kind()))
        jax.config.update("jax_compilation_cache_max_size", KEPT_PROGRAMS_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_KEPT_SECONDS)


def _processor_kind() -> str:
    """The instruction sets of this machine, as a short name."""
    try:
        with open("/proc/cpuinfo") as file:
            features = next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def _program_name() -> str:
    """The command as the user types it: "llmq", or "python -m train.pretrain"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else os.path.basename(sys.argv[0])


def _choose_verb(
    verbs: Mapping[str, str], arguments: list[str], program: str
) -> tuple[Callable[..., Any], list[str], str]:
    """(the verb's main function, the arguments after it, the program's name with it)."""
    verb = arguments[0] if arguments else "--help"
    if verb in HELP:
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
        raise BadInput(f"unknown command {verb!r} for {program}: {did_you_mean(verb, verbs)}")
    return importlib.import_module(verbs[verb]).main, arguments[1:], f"{program} {verb}"


def _options_class(command: Callable[..., Any]) -> type:
    hints = typing.get_type_hints(command)
    hints.pop("return", None)
    options: type
    (options,) = hints.values()
    return options


def _join_texts(options: type, arguments: list[str]) -> list[str]:
    """`--prompt "- a"` as `--prompt=- a`: a text may begin with a hyphen where it does not look like an option."""
    texts = _text_options(options)
    joined: list[str] = []
    for argument in arguments:
        is_text = argument.startswith("-") and not re.fullmatch(r"-h|--(\w[\w-]*(=.*)?)?", argument)
        if is_text and joined and joined[-1].replace("_", "-") in texts:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _text_options(options: type) -> set[str]:
    """Names of the options that take one text."""
    hints = typing.get_type_hints(options)
    return {option_name(name) for name, hint in hints.items() if hint in (str, str | None, tuple[str, ...])}


def _given(arguments: list[str]) -> dict[str, str]:
    """What follows each option, by the name of its field: "" where nothing does. The last one counts."""
    given = {}
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            value = value if equals else "" if following.startswith("--") else following
            given[name.removeprefix("--").replace("-", "_")] = value
    return given


def _of_file(options: type, arguments: list[str]) -> dict[str, list[str]]:
    """{option: arguments} of the file that `--options` names, without the options that the arguments give."""
    kinds = {field.name: str | None for field in dataclasses.fields(options) if IDLE in field.metadata}
    kinds |= {field.name: hint for field, hint in _fields_and_hints(options)}
    given = _given(arguments)
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


def _parse(options: type, arguments: list[str], program: str, default: Any) -> Any:
    """An instance of the options from the arguments; BadInput for what cannot be understood, exit after `--help`."""
    _check_names(options, arguments, program)
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
            raise BadInput(_one_line(complained.getvalue(), options, arguments, program)) from None
        print(said.text().replace(DESCRIPTION, _description(options), 1), end="")
        raise
    given = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    return options(**{name: at_home(name, value) for name, value in given.items()})


def at_home(field: str, value: Any) -> Any:
    """The value of a field; of one in `PATHS` with the home directory in the place of a leading ~."""
    if field not in PATHS:
        return value
    if isinstance(value, tuple):
        return tuple(at_home(field, each) for each in value)
    return os.path.expanduser(value) if isinstance(value, str) else value


def _in_groups(options: type) -> type:
    """A dataclass of dataclasses, one for the options that each class declares: tyro shows each in a box of its own.
    The box of `LoggingOptions` is headed "logging options", that of the command's own class "options".

    Help texts lose the line breaks of our docstrings, so that tyro fills them to the terminal's width.
    """
    texts: dict[str, str | None] = {}
    declared_by: dict[str, type] = {}
    for ancestor in reversed(options.__mro__[:-1]):
        texts |= {field.arg_name: field.description for field in docstring_parser.parse_from_object(ancestor).params}
        declared_by = {**dict.fromkeys(inspect.get_annotations(ancestor), ancestor), **declared_by}
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for field, hint in _fields_and_hints(options):
        # Without prefix_name=False it would be --optimizer.learning-rate.
        shown = tyro.conf.arg(help=" ".join((texts.get(field.name) or "").split()), prefix_name=False)
        kept = {name: getattr(field, name) for name in ("default", "default_factory", "kw_only")}
        declaring = declared_by[field.name]
        words = [] if declaring is options else re.findall("[A-Z][a-z]*", declaring.__name__.removesuffix("Options"))
        group = groups.setdefault("_".join(words).lower(), [])
        group.append((field.name, typing.Annotated[hint, shown], dataclasses.field(**kept)))
    boxes: list[tuple[str, Any]] = []
    for name, fields in groups.items():
        box = dataclasses.make_dataclass(name or "options", fields, frozen=True)
        boxes.append((box.__name__, typing.Annotated[box, tyro.conf.arg(name=name.replace("_", " "))]))
    return dataclasses.make_dataclass(options.__name__, boxes, frozen=True)


def _grouped(shown: type, options: Any) -> Any:
    """An instance of what `_in_groups` made of the options' class."""
    groups = {}
    for group in dataclasses.fields(shown):
        kind = typing.get_args(group.type)[0]
        groups[group.name] = kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})
    return shown(**groups)


def _given_fields(options: type) -> list[dataclasses.Field[Any]]:
    """The fields whose options can be given: all but those of `no_option`."""
    return [field for field in dataclasses.fields(options) if field.init]


def _fields_and_hints(options: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields whose options can be given, and their annotations including tyro's."""
    hints = typing.get_type_hints(options, include_extras=True)
    return [(field, hints[field.name]) for field in _given_fields(options)]


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


def _check_names(options: type, arguments: list[str], program: str) -> None:
    """Refuse an unknown option before tyro does: tyro would first complain of whatever its absence leaves missing."""
    given = [field.name for field in _given_fields(options)]
    idle = {
        option_name(each.name): each.metadata[IDLE] for each in dataclasses.fields(options) if IDLE in each.metadata
    }
    names = [option_name(field) for field in given]
    known = {*names, *(name.replace("--", "--no-", 1) for name in names), "--help", "--help-verbose"}
    for before, argument in itertools.pairwise(["", *arguments]):
        name = argument.partition("=")[0].replace("_", "-")
        # tyro's own options print completions for shells.
        if name.startswith("--") and not name.startswith("--tyro-") and name not in known:
            if name in idle:
                raise BadInput(f"{name} has no effect {idle[name]}; leave it out")
            meant = meant_by(name, given, option_name)
            hint = f"{meant} S" if meant.endswith("?") else f"{meant}; s" if meant else "s"
            if before.replace("_", "-") in _text_options(options):
                hint = f"as the text of {before}, write {before}={argument}; s"
            raise BadInput(f'unknown option {name}: {hint}ee "{program} --help"')


def _one_line(box: str, options: type, arguments: list[str], program: str) -> str:
    """tyro's box as one line. Rules separate its sections: the fault, the option's help text, a footer.

    The frame is drawn in the characters of the stream: "╭─ Title ──╮" and "│ text │", or " Title", a rule, "  text".
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).rstrip().splitlines()
    lines = lines[1:-1] if lines[0].startswith("╭") else lines[2:]
    lines = [line[2:].removesuffix("│").rstrip() for line in lines]
    rules = [index for index, line in enumerate(lines) if line.startswith(("───", "---"))] + [len(lines)]
    fault, explanation = lines[: rules[0]], lines[rules[0] + 1 :]
    text = " ".join(" ".join(fault).split())
    see = f'see "{program} --help"'

    if text.startswith("Missing from"):  # the options stand four columns in, their help text eight
        missing = [line.strip() for line in fault if re.match(r" {4}\S", line)]
        return f"missing {' and '.join(', '.join(missing).rsplit(', ', 1))}: {see}"
    if match := re.match(r"Missing value for argument '(.*?)'. Expected (\d+) values", text):
        count = "a value" if match[2] == "1" else f"{match[2]} values"
        return f"{match[1]} needs {count}: {see}"
    if match := re.match(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*)\)", text):
        name = match[2].rpartition(".")[2]  # one without an option's name is called by its group, too
        choices = _in_order(options, name, [choice for choice in re.findall(r"'(.*?)'", match[3]) if choice != "None"])
        return f"{name} cannot be {match[1]!r}: choose from {', '.join(choices)}"
    if (match := re.match(r"Error parsing (\S+?): ", text)) and len(explanation) > 1:
        wanted = explanation[1].strip().removeprefix(match[1]).strip()
        given = _values_after(match[1], arguments)
        return f"{match[1]} takes {KINDS.get(wanted, wanted)}, not {given!r}: {see}"
    if match := re.match(r"Unrecognized options: (.*)", text):
        fields = {field.name for field in dataclasses.fields(options)}
        places = [words for name, words in WITHOUT_NAME.items() if name in fields]
        begins = [index for index, argument in enumerate(arguments) if f"{match[1]} ".startswith(f"{argument} ")]
        after_an_option = any(argument.startswith("-") for argument in arguments[: max(begins, default=0) + 1])
        words = "" if after_an_option or not places else f"{', '.join(places)}; "
        return f"no option takes {match[1]!r}: {words}{see}"
    return f"{text}: {see}"


def _in_order(options: type, name: str, choices: list[str]) -> list[str]:
    """An option's choices in the order of their declaration, which tyro loses where the option may be None."""
    hint = typing.get_type_hints(options).get(name.removeprefix("--").replace("-", "_"))
    declared = [value for part in (hint, *typing.get_args(hint)) for value in typing.get_args(part)]
    return [value for value in declared if value in choices] or choices


def _values_after(option: str, arguments: list[str]) -> str:
    """What the user wrote for an option, the last time it stands there."""
    written = ""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and name.replace("_", "-") == option:
            rest = [following.startswith("--") for following in arguments[index + 1 :]] + [True]
            written = value if equals else " ".join(arguments[index + 1 : index + 1 + rest.index(True)])
    return written
