"""safetensors files: one, or shards with an index, read tensor by tensor and written in shards.

Files are read with pread, not mapped into memory: so what has been read takes memory once, as an array.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmq_jax.defaults import MAX_SHARD_SIZE
from llmq_jax.errors import BadInput
from llmq_jax.interop.tables import LazyTensor
from llmq_jax.interop.tensor_files import TensorFiles, damaged, open_file_or_shards, write_json

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
SIZE = re.compile(r"\s*(\d+(\.\d*)?|\.\d+)\s*[KMGT]B\s*", re.IGNORECASE)
# Types of which the safetensors library makes no numpy arrays.
READ_AS_BYTES = ("F8_E4M3", "F8_E5M2")


def is_safetensors(path: Path) -> bool:
    """Whether a path is a `.safetensors` file, or a folder with `model.safetensors` or an index of shards."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / WEIGHTS).is_file() or (path / INDEX).is_file()


def open_safetensors(path: Path) -> TensorFiles:
    """The tensors of such a file or folder."""
    return open_file_or_shards(path, WEIGHTS, _read)


def write_safetensors(
    folder: Path, tensors: Mapping[str, LazyTensor], max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """`model.safetensors`, or shards of at most `max_shard_size` ("5GB", "500MB", bytes) and their index."""
    check_shard_size(max_shard_size)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for filename, names in split.filename_to_tensors.items():
        shard = {name: np.asarray(tensors[name]) for name in names}
        try:
            save_tensors(shard, folder / filename)
        except SafetensorError as error:
            raise BadInput(f"{folder / filename}: cannot be written ({error})") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def check_shard_size(size: int | str) -> None:
    """BadInput for a size that huggingface_hub does not know, such as GiB, and for one that is not positive, of
    which it would make files of one tensor each."""
    if isinstance(size, str):
        good = SIZE.fullmatch(size) is not None and re.search("[1-9]", size) is not None
    else:
        good = type(size) is int and size > 0
    if not good:
        raise BadInput(f'max_shard_size={size!r} is no size; write "5GB" or "500MB"')


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """One file, with the permissions of any new file. safetensors 0.8 writes a temporary one, for its owner alone, and
    renames it: a server under another account could not read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})  # transformers requires "pt"; it says nothing about the numbers
    path.chmod(mode)


def _read(path: Path) -> dict[str, LazyTensor]:
    try:
        file: Any = safe_open(path, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        raise damaged(path, "a safetensors file", error) from error
    names = file.keys()
    return {name: _lazy(path, file, name) for name in names}


def _lazy(path: Path, file: Any, name: str) -> LazyTensor:
    entry = file.get_slice(name)
    dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
    if dtype not in DTYPES:
        raise BadInput(f"{path}: {name} has the type {dtype}, which is not supported")

    def read() -> np.ndarray:
        try:
            return _from_bytes(path, name, shape) if dtype in READ_AS_BYTES else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path}: {name} cannot be read ({error}); get the file again") from error

    return LazyTensor(shape, DTYPES[dtype], read)


def _from_bytes(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor from a file's bytes: 8 bytes for the length of the header, the header, the data. The header was checked
    when the file was opened."""
    with path.open("rb") as file:
        entry = json.loads(file.read(int.from_bytes(file.read(8), "little")))[name]
        start, end = entry["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        return np.frombuffer(file.read(end - start), DTYPES[entry["dtype"]]).reshape(shape)
