"""The manifest of a folder: size and SHA-256 of every file in it.

Orbax restores arrays with flipped bits without a word, so every checkpoint carries one, and it is verified before
anything is read from the checkpoint.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq_jax.atomic_files import json_bytes, sync_folder
from llmq_jax.errors import BadInput
from llmq_jax.json_text import parse_json

MANIFEST = "manifest.json"
Entries = dict[str, dict[str, Any]]
"""{file, relative to the folder: its `size` in bytes and its `sha256`}"""


class CorruptCheckpoint(BadInput):
    """The files of a checkpoint are not those that were saved."""


def write_manifest(folder: Path, known: Mapping[str, Any] | None = None) -> None:
    """Write `manifest.json` last, and put everything in the folder on the disk (fsync), names included. `known` are the
    entries of files that came with a manifest, and are not hashed again."""
    files = dict(known or {})
    for name, path in _files(folder).items():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        if name not in files:
            files[name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    with open(folder / MANIFEST, "wb") as file:
        file.write(json_bytes({"version": 1, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        sync_folder(Path(parent))


def verify_manifest(folder: Path) -> None:
    """Compare the folder with its manifest; CorruptCheckpoint names the first file that is missing, was added, or has
    another size or content. Hidden files that were added do not count: file managers leave them wherever they look."""
    expected = read_manifest(folder)
    found = _files(folder)
    for name, entry in expected.items():
        size, digest = entry["size"], entry["sha256"]
        if name not in found:
            fault = "is missing"
        elif not found[name].is_file():  # a link to a device could be read for ever
            fault = "is no file"
        elif (now := found[name].stat().st_size) != size:
            fault = f"has {now:,} bytes instead of {size:,}"
        elif file_digest(found[name]) != digest:
            fault = "has changed since it was saved (SHA-256 differs)"
        else:
            continue
        raise _damage(folder, f"{name} {fault}")
    hidden = {name for name in found if any(part.startswith(".") for part in name.split("/"))}
    if added := sorted(found.keys() - expected.keys() - hidden):
        raise _damage(folder, f"{added[0]} was not there when it was saved")


def read_manifest(folder: Path) -> Entries:
    """The entries of all files; CorruptCheckpoint where they cannot be read."""
    try:
        files = parse_json((folder / MANIFEST).read_bytes())["files"].items()
        return {name: {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for name, entry in files}
    except FileNotFoundError:
        raise _damage(folder, f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise _damage(folder, f"{MANIFEST} cannot be read") from None


def _damage(folder: Path, fault: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"checkpoint {folder} is damaged: {fault}; copy it again from where it is whole, or use another checkpoint"
    )


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder but the manifest, by its name relative to the folder."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files.pop(MANIFEST, None)
    return dict(sorted(files.items()))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
