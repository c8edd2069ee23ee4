"""What the readers of weight files share: one mapping over several files, indexes of shards, errors, JSON files."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmq_jax.errors import BadInput
from llmq_jax.interop.tables import LazyTensor
from llmq_jax.json_text import parse_json


class TensorFiles(Mapping[str, LazyTensor]):
    """The tensors of one or several files by name; each is read when `np.asarray` asks for it."""

    def __init__(self, files: Mapping[Path, Mapping[str, LazyTensor]]):
        self._tensors: dict[str, LazyTensor] = {}
        self._file_of: dict[str, Path] = {}
        for path, tensors in files.items():
            for name, tensor in tensors.items():
                if name in self._tensors:
                    raise BadInput(f"{path}: holds {name}, which {self._file_of[name].name} holds too")
                self._tensors[name] = tensor
                self._file_of[name] = path

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def file_of(self, name: str) -> Path:
        return self._file_of[name]


def open_file_or_shards(path: Path, name: str, read: Callable[[Path], Mapping[str, LazyTensor]]) -> TensorFiles:
    """The tensors of a file or, in a folder, of the file `name` or of the shards that its index names; `read` opens one
    file."""
    index = path / f"{name}.index.json"
    if (path / name).is_file():
        path = path / name
    if path.is_file():
        return TensorFiles({path: read(path)})
    if index.is_file():
        return open_shards(index, Path(name).suffix, read)
    raise BadInput(f"{path}: has neither {name} nor {index.name}")


def open_shards(index: Path, suffix: str, read: Callable[[Path], Mapping[str, LazyTensor]]) -> TensorFiles:
    """The tensors of all files that transformers' `*.index.json` names; `read` opens one of them.

    BadInput unless the index is right: its files have that suffix and lie beside it, and each holds what it says.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{index}: has no weight_map from names to files")
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if not re.fullmatch(r"[^/\\]+" + re.escape(suffix), name):
            raise BadInput(f"{index}: names {name!r}, which is no {suffix} file in the same folder")
    beside = set(os.listdir(index.parent))  # an operating system may refuse to look for a name, if it is too long
    missing = [name for name in shards if name not in beside or not (index.parent / name).is_file()]
    if missing:
        raise BadInput(f"{index}: {len(missing)} of {len(shards)} shards are not there: {', '.join(missing[:5]):.300}")
    files = TensorFiles({index.parent / name: read(index.parent / name) for name in shards})
    for name, shard in weight_map.items():
        if name not in files or files.file_of(name).name != shard:
            raise BadInput(f"{index}: says that {shard} holds {name}, which it does not")
    return files


def damaged(path: Path, kind: str, reason: object) -> BadInput:
    """The error to raise for a file that is not of the `kind` expected ("a safetensors file")."""
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git"):
            return BadInput(f"{path}: is a Git LFS pointer; run `git lfs pull` in its folder")
    reason = " ".join(str(reason).split()) or type(reason).__name__
    return BadInput(f"{path}: not {kind}, or truncated or damaged ({reason}); get it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is BadInput."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds no JSON object")
    return value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """JSON as transformers writes it: sorted and indented."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
