"""A file of lines that take hours: when the command is stopped, what is done stays, and the same command goes on.

Until all is done the lines stand in FILE.partial, after a first one that tells of which command they are.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmq_jax.atomic_files import AppendedFile, write_atomically
from llmq_jax.command_line import option_name
from llmq_jax.errors import BadInput


class KeptLines:
    """The lines of a file that is being written, without their line breaks."""

    def __init__(self, path: Path, command: dict[str, Any]):
        """`command` holds whatever decides on the lines, by name. BadInput: lines of another one are there."""
        self.partial = path.with_name(f"{path.name}.partial")
        self.lines: list[str] = []
        self._heading = json.dumps(command)
        found = self.partial.read_bytes() if self.partial.exists() else b""
        self._whole = found[: found.rfind(b"\n") + 1]  # without a last line that a kill has torn
        if self._whole:
            self.lines = self._found(json.loads(self._heading))
        self._file: AppendedFile | None = None

    def add(self, lines: Sequence[str]) -> None:
        """Append lines, which are on the disk before this returns."""
        if self._file is None:
            self._file = AppendedFile(self.partial)
            self._file.cut(len(self._whole))
            if not self._whole:
                self._file.append(_data([self._heading]))
        self._file.append(_data(lines))
        self._file.sync()
        self.lines += lines

    def _found(self, command: dict[str, Any]) -> list[str]:
        try:
            heading, *lines = self._whole.decode().split("\n")[:-1]
            told, *rows = map(json.loads, (heading, *lines))
        except (ValueError, RecursionError):
            told, rows = None, []
        if not all(isinstance(row, dict) for row in (told, *rows)):
            raise BadInput(f"{self.partial} is no part of such a file; rename or remove it")
        differing = [option_name(name) for name in {**told, **command} if told.get(name) != command.get(name)]
        if differing:
            raise BadInput(
                f"{self.partial} was begun by a command that differs in {', '.join(differing)}; give that one again to "
                "go on, or remove the file"
            )
        return lines


@contextlib.contextmanager
def kept_lines(path: Path, command: dict[str, Any], count: int) -> Iterator[KeptLines]:
    """The lines of `path`, to which to add until they are `count`: the file is written at the end. What ends it earlier
    leaves them, and whoever stopped it is told."""
    kept = KeptLines(path, command)
    if kept.lines:
        print(f"going on after {len(kept.lines):,} of {count:,}, found in {kept.partial}", file=sys.stderr)
    try:
        yield kept
    except BaseException:
        if kept.lines:
            said = f"{len(kept.lines):,} of {count:,} are in {kept.partial}; the same command goes on from there"
            print(said, file=sys.stderr)
        raise
    write_atomically(path, _data(kept.lines))
    kept.partial.unlink(missing_ok=True)


def _data(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
