"""Files that are either whole or not there, whenever the process or the machine stops, or the disk is full."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmq_jax.errors import BadInput


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`: readers, and whoever comes after a crash, see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path), open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class AppendedFile:
    """A file that grows by whole pieces, each handed to the system at once. A piece for which there is no room is not
    written at all, and waits to be written with the next one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._waiting = b""

    def append(self, piece: bytes = b"") -> None:
        self._waiting += piece
        end = os.fstat(self._file.fileno()).st_size
        written = 0
        try:
            with naming(self.path):
                while written < len(self._waiting):
                    written += self._file.write(self._waiting[written:])
        except BaseException:
            self._file.truncate(end)
            raise
        self._waiting = b""

    def cut(self, size: int) -> None:
        """Keep only the first `size` bytes."""
        self._file.truncate(size)

    def cut_torn_line(self) -> None:
        """Drop a last line that lacks its line break, as a killed process leaves it."""
        self.cut(self.path.read_bytes().rfind(b"\n") + 1)

    def sync(self) -> None:
        """Put everything on the disk, including pieces that wait."""
        self.append()
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Pieces that wait are lost."""
        self._file.close()


def lock_file(path: Path) -> int:
    """A descriptor that holds the lock (flock) of a file, made if it is missing, until it is closed. A killed process
    leaves no lock behind. BlockingIOError: another process holds it. BadInput: the file system has no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        raise BadInput(
            f"{path.parent}: its file system cannot lock files ({error.strerror}); name a folder on another one"
        ) from None
    return descriptor


def write_json_atomically(path: Path, value: Any) -> None:
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON; paths become strings."""
    return (json.dumps(value, indent=2, default=os.fspath) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Make names that were added to a folder, renamed or removed survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FULL = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
"""{error number: the system's message} where there is no room: on the disk, in the user's quota, in a file."""


def full_number(error: BaseException) -> int | None:
    """The number in FULL of an error; None for other errors. Libraries in other languages repeat the system's message
    in errors of their own."""
    if isinstance(error, OSError):
        return error.errno if error.errno in FULL else None
    return next((number for number, words in FULL.items() if words in str(error)), None)


def full_disk(error: BaseException) -> str | None:
    """The message of FULL that an error has, with the file if that is known; None for other errors."""
    number, file = full_number(error), getattr(error, "filename", None)
    return None if number is None else f"{FULL[number]}: {file}" if file else FULL[number]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors of writing it; the system names it only where it cannot be opened."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
