"""An output file whose lines may take hours: when the command is stopped, finished lines stay, and the same command
goes on from there.

Until all lines are done, they are in FILE.partial, after a first line that tells which command they belong to. The
process that writes them holds its lock.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmq_jax.atomic_files import AppendedFile, lock_file, sync_folder, write_atomically
from llmq_jax.errors import BadInput
from llmq_jax.options import option_name

MARK = "lines of"
"""The one field of the first line: it holds the command."""


class KeptLines:
    """The lines of a file that is being written, without their line breaks: for each of `records` an object that has
    the record's fields, in their order."""

    def __init__(self, path: Path, command: Mapping[str, Any], records: Sequence[dict[str, Any]]):
        """`command` holds whatever else the lines depend on, by the names of options. BadInput: FILE.partial belongs to
        another command, or was not written by one."""
        self.partial = _partial(path)
        self.records = records
        self._heading = json.dumps({MARK: command})
        self._file: AppendedFile | None = None
        self._begun = False
        """Whether FILE.partial has its first line."""
        self.lines = self._found() if self.partial.exists() else []

    def add(self, lines: Sequence[str]) -> None:
        """Append lines, which are on the disk before this returns."""
        if self._file is None:
            self._file = AppendedFile(self.partial)
            self._file.cut_torn_line()
            sync_folder(self.partial.parent)
        self._file.append(as_data(lines if self._begun else [self._heading, *lines]))
        self._file.sync()
        self._begun = True
        self.lines += lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _found(self) -> list[str]:
        found = self.partial.read_bytes()
        if self._heading.encode().startswith(found):
            return []  # torn in its first line
        self._begun = True
        stranger = BadInput(f"{self.partial} was not written by this command for these texts; rename or remove it")
        try:
            heading, *lines = found[: found.rfind(b"\n") + 1].decode().split("\n")[:-1]
            told, *rows = map(json.loads, (heading, *lines))
        except (ValueError, RecursionError):
            raise stranger from None
        begun, command = (told.get(MARK) if isinstance(told, dict) else None), json.loads(self._heading)[MARK]
        if not isinstance(begun, dict):
            raise stranger
        if differing := [name for name in {**begun, **command} if begun.get(name) != command.get(name)]:
            raise BadInput(
                f"{self.partial} was begun by a command that differs in {', '.join(map(option_name, differing))}; give "
                "that one again to go on, or remove the file"
            )
        if len(rows) > len(self.records) or not all(map(_is_of, rows, self.records)):
            raise stranger
        return lines


def _is_of(row: Any, record: dict[str, Any]) -> bool:
    # Compared as JSON text, since NaN does not equal itself.
    return isinstance(row, dict) and json.dumps({name: row.get(name) for name in record}) == json.dumps(record)


@contextlib.contextmanager
def kept_lines(path: Path, command: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> Iterator[KeptLines]:
    """The lines of `path`, to which the caller adds one for each record: the file is written at the end. Whatever ends
    this earlier leaves the finished lines in FILE.partial, and a message says so. BadInput: another process writes
    them."""
    with _locked(_partial(path)):
        check_out(path)  # once more: another process may have finished it meanwhile
        kept, count = KeptLines(path, command, records), f"{len(records):,}"
        if kept.lines:
            print(f"going on after {len(kept.lines):,} of {count}, found in {kept.partial}", file=sys.stderr)
        try:
            yield kept
            write_atomically(path, as_data(kept.lines))
        except BaseException:
            if kept.lines:
                done = f"{len(kept.lines):,} of {count}"
                print(f"{done} are in {kept.partial}: the command goes on from there", file=sys.stderr)
            raise
        finally:
            kept.close()
        kept.partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    def is_ours() -> bool:
        return partial.exists() and os.path.samestat(os.fstat(lock), partial.stat())

    while True:
        try:
            lock = lock_file(partial)
        except BlockingIOError:
            raise BadInput(
                f"another process is writing {partial}; wait for it, or name another file by --out"
            ) from None
        if is_ours():
            break
        os.close(lock)  # of a file that who held it has removed
    try:
        yield
    finally:
        if is_ours() and not partial.stat().st_size:  # made by the lock alone
            partial.unlink()
        os.close(lock)


def check_out(out: Path) -> None:
    """BadInput for a file that cannot be written anew: now, not after hours."""
    if out.exists():
        raise BadInput(f"--out {out} is there already; name a new file")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise BadInput(f"--out {out}: nothing can be written to the folder {out.parent}; make it, or name another")


def as_data(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
