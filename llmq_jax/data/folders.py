"""The files of a folder, for readers of data that come in several files."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmq_jax.errors import BadInput, near_path

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderFiles:
    """Some files of a folder; readers accept it in place of a path."""

    folder: Path
    files: tuple[Path, ...]
    """In the order in which they are read."""
    split: str | None = None
    """The split that they belong to, for messages; None: they are all files of the folder."""

    def __str__(self) -> str:
        return str(self.folder) if self.split is None else f"{self.folder} ({self.split})"


def looked_in(path: Path) -> str:
    """For a message about a path that is not there: the nearest name beside it or, of a relative path, the folder from
    which it is looked up, and what to do where it may be a name on the hub."""
    near = near_path(path)
    if near or path.is_absolute():
        return near
    where = f"; paths are looked up from {Path.cwd()}"
    if len(path.parts) != 2 or path.suffix or path.parts[0][0] in ".~" or path.parent.exists():
        return where
    command = f'hf download --repo-type dataset {path} --local-dir {path.name} --include "*.parquet"'
    return f"{where}; if it is a data set on the hub, download its Parquet files (or *.jsonl) first: {command}"


DataPath = str | Path | FolderFiles
"""Where data are: a file, a folder (all its files are read), or some files of a folder."""


def files_in(folder: Path, passed_over: Callable[[Path], str | None], wanted: str) -> list[Path]:
    """The files below a folder that a reader takes, those in linked folders too, sorted by path. What is hidden, empty
    or no file (a broken link) is passed over; the number of all that is passed over is logged.

    passed_over: gives the kind of a file that the reader does not take ("binary"), None for one that it takes.
    wanted: what errors call the files that it takes. Raises BadInput where there is none.
    """
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    for where, folders, names in _walk(folder):
        skipped["hidden"] += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(where, name) for name in names if not name.startswith(".")):
            if not path.is_file():  # a broken link, a socket
                skipped["special"] += 1
            elif path.stat().st_size == 0:
                skipped["empty"] += 1
            elif kind := passed_over(path):
                skipped[kind] += 1
            else:
                files.append(path)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()) if count)
    if not files:
        skips = f" (skipped: {counts})" if counts else ""
        raise BadInput(f"{folder} holds no {wanted}{skips}; put one there, or name another path")
    if counts:
        _log.warning("%s: read %d files, skipped %s", folder, len(files), counts)
    return sorted(files)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, and then through the folders that links lead to, except those visited already and those that contain
    `folder`."""
    seen = {str(above) for above in Path(os.path.realpath(folder)).parents}
    ahead = [str(folder)]
    for start in ahead:
        for where, folders, names in os.walk(start, onerror=_cannot_list):
            real = os.path.realpath(where)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()  # of several paths to a folder, always the same one is taken
            yield where, folders, names
            ahead += [path for path in (os.path.join(where, name) for name in folders) if os.path.islink(path)]


def _cannot_list(error: OSError) -> None:
    raise BadInput(f"{error.filename} cannot be read ({error.strerror})")
