"""Folders that are written whole or not at all."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder`, whether that exists or not.

    If filling or replacing fails, everything is as before. `folder` must be resolved: a link would be replaced, not
    what it leads to.
    """
    mark = secrets.token_hex(4)  # no process id: in containers these recur, and a killed process leaves its folder
    partial = folder.with_name(f".{folder.name}.partial-{mark}")
    earlier = folder.with_name(f".{folder.name}.earlier-{mark}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(earlier)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        raise
    if earlier.exists():
        shutil.rmtree(earlier)
