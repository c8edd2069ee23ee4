"""Folders that are written whole or not at all, and what they may take the place of."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path

from llmq_jax.atomic_files import FULL, full_number
from llmq_jax.errors import BadInput


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder`, whether that exists or not.

    If filling or replacing fails, everything is as before; a full disk is an OSError that names `folder` or a file in
    it. `folder` must be resolved: a link would be replaced, not what it leads to.
    """
    mark = secrets.token_hex(4)  # no process id: in containers these recur, and a killed process leaves its folder
    partial = folder.with_name(f".{folder.name}.partial-{mark}")
    earlier = folder.with_name(f".{folder.name}.earlier-{mark}")
    refuse_no_permission(folder, folder.parent)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(earlier)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        number = full_number(error)
        if number is not None:  # the error names no file, or one that is gone, or is a library's own
            place = str(getattr(error, "filename", None) or folder).replace(str(partial), str(folder))
            raise OSError(number, FULL[number], place) from error
        raise
    if earlier.exists():
        shutil.rmtree(earlier)


def refuse_no_permission(named: Path, folder: Path, advice: str = "name another folder") -> None:
    """BadInput, which calls it `named`, for a folder in which this user may make no file, or that they may not make."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"{named}: this user may not write in {there}; {advice}, or change its permissions")


def check_target(folder: Path, overwrite: bool, needed: str, exported: Collection[str]) -> None:
    """BadInput unless an export may go to a folder: a new or empty one or, with `overwrite`, an earlier export, which
    has a file `needed` and only files that match the patterns `exported`."""
    refuse_no_permission(folder, folder.absolute().parent)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; name a folder that does not exist")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise BadInput(
            f"{folder}: is not empty; name another folder, or replace an earlier export with --overwrite (in Python: "
            "overwrite=True)"
        )
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in exported)]
    if foreign or needed not in names:
        odd = f"holds {foreign[0]}" if foreign else f"has no {needed}"
        raise BadInput(f"{folder}: {odd}, so it is no earlier export and is not overwritten")
