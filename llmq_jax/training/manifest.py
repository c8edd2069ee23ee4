"""The manifest of a folder: size and SHA-256 of every file in it.

Orbax restores arrays with flipped bits without a word, so every checkpoint carries one, and it is verified before
anything is read from the checkpoint.
"""

import hashlib
import os
from pathlib import Path

from llmq_jax.atomic_files import json_bytes, sync_folder
from llmq_jax.errors import BadInput
from llmq_jax.json_text import parse_json

MANIFEST = "manifest.json"


class CorruptCheckpoint(BadInput):
    """The files of a checkpoint are not those that were saved."""


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` last, and put everything in the folder on the disk (fsync), names included."""
    files = {}
    for name, path in _files(folder).items():
        digest = _sha256(path, sync=True)
        files[name] = {"size": path.stat().st_size, "sha256": digest}
    with open(folder / MANIFEST, "wb") as file:
        file.write(json_bytes({"version": 1, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        sync_folder(Path(parent))


def verify_manifest(folder: Path) -> None:
    """Compare the folder with its manifest; CorruptCheckpoint names the first file that is missing, was added, or has
    another size or content. Hidden files that were added do not count: file managers leave them wherever they look."""
    try:
        expected = parse_json((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in expected.items()}
    except FileNotFoundError:
        raise _damage(folder, f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise _damage(folder, f"{MANIFEST} cannot be read") from None
    found = _files(folder)
    for name, (size, digest) in expected.items():
        if name not in found:
            fault = "is missing"
        elif not found[name].is_file():  # a link to a device could be read for ever
            fault = "is no file"
        elif (now := found[name].stat().st_size) != size:
            fault = f"has {now:,} bytes instead of {size:,}"
        elif _sha256(found[name]) != digest:
            fault = "has changed since it was saved (SHA-256 differs)"
        else:
            continue
        raise _damage(folder, f"{name} {fault}")
    hidden = {name for name in found if any(part.startswith(".") for part in name.split("/"))}
    if added := sorted(found.keys() - expected.keys() - hidden):
        raise _damage(folder, f"{added[0]} was not there when it was saved")


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


def _sha256(path: Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
