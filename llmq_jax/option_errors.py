"""What is wrong with the arguments of a command, in one line.

tyro draws its error messages as boxes of several lines, which `one_line` reads.
"""

import dataclasses
import itertools
import re
import textwrap
import typing

from llmq_jax.errors import BadInput
from llmq_jax.option_names import meant_by
from llmq_jax.options import IDLE, given_fields, help_texts, option_name, text_options, without_names

WITHOUT_NAME = {
    "prompt": "a text is given by --prompt",
    "prompt_file": "a file by --prompt-file",
    "text": "a text is given by --text",
    "data": "a file by --data",
    "system": "messages are typed or come from standard input, and a system text is given by --system",
}
"""{field: advice for a value that is given without an option's name, where the command has this field}."""
OF_PLACES = ("--model", "--input", "--output", "--out", "--path", "--folder", "--init-from")
"""Options that elsewhere name a model, a file or a folder, where here it may be given without one."""
RUN_OF_NANOGPT = "--out-dir"
"""nanoGPT's option for the folder of a run, in its training as in its sampling."""
KINDS = {"INT": "an integer", "FLOAT": "a number", "FLOAT FLOAT": "two numbers", "{True,False}": "True or False"}


def check_names(options: type, arguments: list[str], program: str) -> None:
    """Refuse an unknown option before tyro does: tyro would first complain of whatever its absence leaves missing."""
    bare = without_names(options)
    given = [field.name for field in given_fields(options) if field.name not in bare]
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
            meant = meant_by(name, given, _as_option)
            of_place = name == RUN_OF_NANOGPT or (not meant and name in OF_PLACES)
            if bare and (name.removeprefix("--") in bare or of_place):
                meant = f"write {' '.join(map(str.upper, bare))} without an option's name"
            hint = f"{meant} S" if meant.endswith("?") else f"{meant}; s" if meant else "s"
            if before.replace("_", "-") in text_options(options):
                hint = f"as the text of {before}, write {before}={argument}; s"
            raise BadInput(f'unknown option {name}: {hint}ee "{program} --help"')


def _as_option(field: str, value: str = "") -> str:
    return f"{option_name(field)} {value}".rstrip()


def one_line(box: str, options: type, arguments: list[str], program: str) -> str:
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
        meaning = help_texts(options).get(match[1].lstrip("-").replace("-", "_"), "").partition(". ")[0].rstrip(".")
        return f"{match[1]} needs {count}: {'; '.join(filter(None, (meaning, see)))}"
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
        before = arguments[: max(begins, default=0)]
        names = [index for index, argument in enumerate(before) if argument.startswith("--")]
        hints = [", ".join(places)] if places and not match[1].startswith("-") else []
        if names:  # a text may be long
            hints = [f"it follows {textwrap.shorten(' '.join(before[names[-1] :]), 60, placeholder=' ...')}"]
        return f"no option takes {match[1]!r}: {'; '.join([*hints, see])}"
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
