"""The one error type for bad input, the hint at what was meant, and warnings."""

import contextlib
import difflib
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

BAD_INPUT = 2
"""The exit code of a command whose input was bad."""


class BadInput(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where, and what to do about it. Commands print it and exit with code 2.
    Whatever it quotes from a file, the message has no line breaks and no control characters for a terminal.
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_printable, message)))


@contextlib.contextmanager
def at_place(where: object) -> Iterator[None]:
    """BadInput raised within it begins with this place, unless it names a file or folder there already."""
    try:
        yield
    except BadInput as error:
        if str(error).startswith((f"{where}:", f"{where}{os.sep}")):
            raise
        raise BadInput(f"{where}: {error}") from error


def _printable(character: str) -> str:
    return character if is_text(character) else " " if character.isspace() else "\ufffd"


# Controls that change the direction of the text after them, beyond the quoted text too.
_TURNING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def is_text(character: str) -> bool:
    """Whether a terminal only shows the character, or joins, separates or breaks words at it (as scripts and emoji
    need)."""
    kind = unicodedata.category(character)
    return character.isprintable() or kind == "Zs" or (kind == "Cf" and character not in _TURNING)


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: object, known: Iterable[str], count: int = 3) -> str:
    """ "did you mean a or b?" with the nearest of the known names, or all of them where none is near."""
    known = list(known)
    near = close_names(str(name), known, count)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"


def close_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that are most like this one, at most `count`, the nearest first; often none. Names that begin
    with it come first: `prompts` means `prompts_per_step`, though `max_prompt` is closer by its letters."""
    known = list(known)
    begun = sorted((each for each in known if len(name) > 2 and each.startswith(name)), key=len)
    return list(dict.fromkeys([*begun, *difflib.get_close_matches(name, known, n=count, cutoff=0.6)]))[:count]


def no_such_path(name: str | Path) -> str:
    """What to say of a path that does not exist, with the nearest name in its folder."""
    return f"{name}: there is no such file or folder{near_path(Path(name).expanduser())}"


def near_path(path: Path) -> str:
    """For a message about a path that does not exist: the nearest name in its folder."""
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    near = [str(path.parent / other) for other in close_names(path.name, names, count=1)]
    return f"; did you mean {near[0]}?" if near else ""


class PythonAdvice(UserWarning):
    """A warning whose advice is for programs: commands leave it out, and where it concerns them give their own."""


def warn(message: str, category: type[UserWarning] = UserWarning) -> None:
    """A warning at the user's own line: the newest one that is not of this package."""
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
