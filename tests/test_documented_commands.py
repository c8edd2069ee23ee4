"""Every command that the README, the docs and the help texts show is one that the programs understand."""

import importlib
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest

from llmq_jax.command_line import run
from llmq_jax.commands import VERBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [path for folder in ("train", "convert", "bench") for path in sorted((ROOT / folder).glob("*.py"))]
COMMAND = re.compile(r"(python -m (?:train|convert|bench)\.\w+|llmq \w+)(?= |$)")


def commands(path):
    """(line number, arguments) of each command in the file's code: of pages what is indented or fenced, of programs
    what is indented. Variables of the shell have the values that the same file gives them."""
    lines = re.sub(r" *\\\n +", " ", path.read_text()).split("\n")
    given = {}
    for number, line in enumerate(lines, 1):
        if found := re.match(r" *(\w+)=(\"[^\"]*\"|'[^']*'|\S+)$", line):
            given[found[1]] = found[2].strip("\"'")
        code = line.strip().removeprefix("$ ").replace("run: ", "")
        if not COMMAND.match(code) or (path.suffix == ".py" and not line.startswith("    ")):
            continue
        code = re.split(r" {3,}(?!-)|\s+# ", code)[0]  # what follows after a gap is a remark
        for _ in given:
            code = re.sub(r"\$\{?(\w+)\}?", lambda match: given.get(match[1], match[0]), code)
        words = shlex.split(code)
        redirected = next((i for i, word in enumerate(words) if word in ("<", ">", "|", ";", "&&")), len(words))
        yield number, [word for word in words[:redirected] if word != "&"]


CASES = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}:{number} {shlex.join(words)[:60]}")
    for path in [*PAGES, *PROGRAMS]
    for number, words in commands(path)
]


@pytest.mark.parametrize("words", CASES)
def test_it_is_understood(words, capsys):
    name = VERBS[words[1]] if words[0] == "llmq" else words[2]
    module = importlib.import_module(name)
    arguments = [word for word in words[2 if words[0] == "llmq" else 3 :] if word != "..."]

    def command(options):
        pass

    command.__annotations__ = {key: hint for key, hint in get_type_hints(module.main).items() if key != "return"}
    with pytest.raises(SystemExit) as ended:
        run(command, arguments, program=" ".join(words[:3]), defaults=getattr(module, "starting_options", None))
    error = capsys.readouterr().err
    assert ended.value.code == 0 or ("..." in words and error.startswith("error: missing ")), error


def test_there_are_many():
    assert len(CASES) > 100
