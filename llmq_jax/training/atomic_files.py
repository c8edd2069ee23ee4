"""Files that are either whole or not there, whenever the process or the machine stops."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`: readers, and whoever comes after a crash, see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


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
