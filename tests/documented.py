"""The commands that the README, the docs and the programs' help texts show."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [path for folder in ("train", "convert", "bench") for path in sorted((ROOT / folder).glob("*.py"))]
OURS = r"(?:python -m (?:train|convert|bench)\.\w+|llmq \w+)"
COMMAND = re.compile(rf"({OURS}|(\w+=\S+ )*(make|pytest|pip|xprof) \S+)(?= |$)")
IN_PROSE = re.compile(rf"`({OURS}\s[^`]+)`")
"""Without an argument it is no more than a name."""


@dataclass(frozen=True)
class Command:
    path: Path
    line: int
    words: tuple[str, ...]
    stdin: str | None = None
    """The file that it reads, by `<`, and the one that it writes, by `>`."""
    stdout: str | None = None

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def is_ours(self) -> bool:
        return re.match(OURS, str(self)) is not None

    @property
    def program(self) -> str:
        """The module, or "llmq"."""
        return self.words[0] if self.words[0] == "llmq" else self.words[2]

    @property
    def arguments(self) -> list[str]:
        """A verb of llmq is one of them."""
        return list(self.words[1 if self.words[0] == "llmq" else 3 :])

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def commands(path: Path) -> list[Command]:
    """Those in the file's code, of pages what is indented, fenced or between backticks, of programs what is indented,
    in their order. Variables of the shell have the values that the same file gives them, and dots the options that the
    program was last shown with."""
    found = list(_in_code(path))
    if path.suffix == ".md":
        text = path.read_text()
        for match in IN_PROSE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Command(path, line, tuple(shlex.split(match[1]))))
    return sorted(found, key=lambda command: command.line)


def _in_code(path: Path) -> Iterator[Command]:
    given: dict[str, str] = {}
    options: dict[tuple[str, ...], list[str]] = {}
    after = 1
    for text in re.split(r"(?<!\\)\n", path.read_text()):
        number, after = after, after + text.count("\n") + 1
        line = re.sub(r" *\\\n +", " ", text)
        if re.match(r" +\w+=\S", line) and all(re.match(r"\w+=", word) for word in shlex.split(line)):
            given.update(word.split("=", 1) for word in shlex.split(line))
        code = line.strip().removeprefix("$ ").replace("run: ", "")
        code = re.sub(r'^eval "\$\((.*?)\)"', r"\1", code)
        if not COMMAND.match(code) or (path.suffix == ".py" and not line.startswith("    ")):
            continue
        code = re.split(r" {3,}|\s+# ", code)[0]  # what follows after a gap is a remark
        words = [part for word in shlex.split(code) for part in _expanded(word, given)]
        redirected = next((i for i, word in enumerate(words) if word in ("<", ">", "|", ";", "&&")), len(words))
        files = dict(zip(words[redirected::2], words[redirected + 1 :: 2], strict=False))
        words = [word for word in words[:redirected] if word != "&"]
        program = tuple(words[:3])
        if "..." in words:
            words[3:4] = options[program]
        else:
            options[program] = words[3:]
        yield Command(path, number, tuple(words), files.get("<"), files.get(">"))


def _expanded(word: str, given: dict[str, str]) -> list[str]:
    """A word with the values of its variables, as a shell takes it apart: where there are spaces in the values."""
    if not any(re.search(rf"\$\{{?{name}\b", word) for name in given):
        return [word]
    return re.sub(r"\$\{?(\w+)\}?", lambda match: given.get(match[1], match[0]), word).split()
