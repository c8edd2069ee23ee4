"""safetensors files: one, or shards with an index, read tensor by tensor and written in shards.

Files are read with pread, not mapped into memory: what has been read counts once, as the array it became.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmq_jax.errors import BadInput
from llmq_jax.interop.tables import LazyTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


class SafetensorsFiles(Mapping[str, LazyTensor]):
    """The tensors of one or several files by name; each is read when `np.asarray` asks for it."""

    def __init__(self, files: list[Path]):
        self._tensors: dict[str, LazyTensor] = {}
        self._file_of: dict[str, Path] = {}
        for path in files:
            file = _open(path)
            names = file.keys()
            for name in names:
                if name in self._tensors:
                    raise BadInput(f"{path}: holds {name}, which {self._file_of[name].name} holds too")
                self._tensors[name] = _lazy(path, file, name)
                self._file_of[name] = path

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def file_of(self, name: str) -> Path:
        return self._file_of[name]


def open_safetensors(path: Path) -> SafetensorsFiles:
    """The tensors of a `.safetensors` file, or of a folder with `model.safetensors` or an index of shards."""
    if path.is_file():
        return SafetensorsFiles([path])
    if (path / WEIGHTS).is_file():
        return SafetensorsFiles([path / WEIGHTS])
    if (path / INDEX).is_file():
        return _open_shards(path / INDEX)
    raise BadInput(f"{path}: has neither {WEIGHTS} nor {INDEX}")


def write_safetensors(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_size: int | str = "5GB"):
    """`model.safetensors`, or shards of at most `max_shard_size` ("5GB", "500MB", bytes) and their index."""
    try:
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise BadInput(f'max_shard_size={max_shard_size!r} is no size; write "5GB" or "500MB"') from error
    for filename, names in split.filename_to_tensors.items():
        shard = {name: np.asarray(tensors[name]) for name in names}
        # "pt" is what transformers requires; it says nothing about the numbers.
        try:
            save_file(shard, folder / filename, metadata={"format": "pt"})
        except SafetensorError as error:
            raise BadInput(f"{folder / filename}: cannot be written ({error})") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _open_shards(index: Path) -> SafetensorsFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{index}: has no weight_map from names to files")
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise BadInput(f"{index}: names {name!r}, which is no safetensors file in the same folder")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise BadInput(f"{index}: {len(missing)} of {len(shards)} shards are not there: {', '.join(missing[:5])}")
    files = SafetensorsFiles([index.parent / name for name in shards])
    for name, shard in weight_map.items():
        if name not in files or files.file_of(name).name != shard:
            raise BadInput(f"{index}: says that {shard} holds {name}, which it does not")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(20).startswith(b"version https://git"):
                raise BadInput(f"{path}: is a Git LFS pointer; run `git lfs pull` in its folder") from error
        raise BadInput(f"{path}: not a safetensors file, or truncated or damaged ({error}); get it again") from error


def _lazy(path: Path, file: Any, name: str) -> LazyTensor:
    entry = file.get_slice(name)
    dtype = entry.get_dtype()
    if dtype not in DTYPES:
        raise BadInput(f"{path}: {name} has the type {dtype}, which is not supported")

    def read() -> np.ndarray:
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path}: {name} cannot be read ({error}); get the file again") from error

    return LazyTensor(tuple(entry.get_shape()), DTYPES[dtype], read)


def read_json(path: Path) -> dict:
    """A JSON object from a file; anything else is BadInput."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds no JSON object")
    return value
