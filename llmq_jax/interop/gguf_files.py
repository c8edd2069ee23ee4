"""GGUF files, llama.cpp's format: metadata and tensors in one file, most of the tensors quantised in blocks.

    header    "GGUF", version, number of tensors, number of metadata pairs
    pairs     key, type, value: numbers, strings and arrays of either
    tensors   name, axes (the fastest first), type, offset in the data
    data      aligned to `general.alignment` bytes

Source: ggml-org/ggml, docs/gguf.md. The package `gguf` knows the layouts of blocks and dequantises them. The header is
read here: the package's GGUFReader makes three arrays for every string of a vocabulary, and does not notice the end of
the file, so that a damaged length makes it loop until memory is full. Here every length is compared with the size of
the file before anything is read.
"""

import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from llmq_jax.errors import BadInput
from llmq_jax.interop.tables import LazyTensor
from llmq_jax.interop.tensor_files import TensorFiles, damaged

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Bytes, unless `general.alignment` says otherwise."""
MAX_AXES = 4

PLAIN_TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types that are read as they are. All others that `gguf.quants` can dequantise become float32."""

AT_ONCE = 2**18
"""Numbers that are dequantised at a time: with fewer, calls cost time; more do not fit the processor's caches."""

LENGTH = struct.Struct("<Q")
"""The length of a string, which stands before its bytes."""

NUMBERS: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


class GGUF(NamedTuple):
    metadata: dict[str, Any]
    """Numbers, truth values, strings and lists of them, by key."""
    tensors: TensorFiles
    """Shapes are PyTorch's: the slowest axis first, so (out, in) for a linear layer."""


class _TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def open_gguf(path: Path) -> GGUF:
    """The metadata of a file and its tensors. BadInput: a file of another kind, damaged, or with unsupported types."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except BadInput:
        raise
    except (OSError, EOFError, ValueError) as error:  # among them what is not UTF-8
        raise damaged(path, "a GGUF file", error) from error


class _Header:
    """Reads one thing after another, and nothing beyond the end of the file."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        start, self.position = self.position, self._within(self.position + size)
        return self._data[start : self.position]

    def _within(self, end: int) -> int:
        if end > len(self._data):
            raise EOFError(f"the header goes on to byte {end:,} of {len(self._data):,}")
        return end

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings, without a call of `take` for each: a vocabulary and its merges are 100,000 of them."""
        data, end, texts = self._data, self.position, []
        for _ in range(count):
            start = self._within(end + LENGTH.size)
            end = self._within(start + LENGTH.unpack_from(data, end)[0])
            texts.append(data[start:end].decode())
        self.position = end
        return texts

    def value(self) -> Any:
        kind = GGUFValueType(self.integer(4))
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            number = self.numbers(kind, 1)[0]
            # A float32 stands for the decimal number that someone wrote: 1e-05, not 9.999999747378752e-06.
            return float(str(number)) if kind == GGUFValueType.FLOAT32 else number.item()
        kind, count = GGUFValueType(self.integer(4)), self.integer(8)
        if kind == GGUFValueType.STRING:
            return self.strings(count)
        return self.numbers(kind, count).tolist()

    def numbers(self, kind: GGUFValueType, count: int) -> np.ndarray:
        if kind not in NUMBERS:
            raise ValueError("arrays of arrays are not supported")
        numbers: np.ndarray = np.frombuffer(self.take(count * NUMBERS[kind].itemsize), NUMBERS[kind])
        return numbers

    def tensor(self) -> _TensorInfo:
        name, axes = self.string(), self.integer(4)
        if axes > MAX_AXES:
            raise ValueError(f"{name} has {axes} axes")
        shape = tuple(self.integer(8) for _ in range(axes))[::-1]
        return _TensorInfo(name, shape, kind=self.integer(4), offset=self.integer(8))


def _read(path: Path, data: mmap.mmap) -> GGUF:
    header = _Header(data)
    if header.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = header.integer(4)
    if version not in VERSIONS:
        reason = "is written for big-endian machines" if version & 0xFFFF == 0 else f"is GGUF of version {version}"
        raise BadInput(f"{path}: {reason}, which is not supported; versions 2 and 3 for little-endian machines are")
    tensor_count, pair_count = header.integer(8), header.integer(8)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = header.string()
        if key in metadata:
            raise ValueError(f"{key} is there twice")
        metadata[key] = header.value()
    infos = [header.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = math.ceil(header.position / alignment) * alignment
    tensors: dict[str, LazyTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise ValueError(f"{info.name} is there twice")
        tensors[info.name] = _lazy(path, info, start, len(data))
    return GGUF(metadata, TensorFiles({path: tensors}))


@functools.cache
def _is_quantised(kind: GGMLQuantizationType) -> bool:
    """Whether the package `gguf` can dequantise blocks of this type; it has no list of such types, so try a block."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return kind.name not in PLAIN_TYPES


def _lazy(path: Path, info: _TensorInfo, start: int, file_size: int) -> LazyTensor:
    kind = GGMLQuantizationType(info.kind) if info.kind in set(GGMLQuantizationType) else None
    type_name = kind.name if kind is not None else f"number {info.kind}"
    if kind is None or (type_name not in PLAIN_TYPES and not _is_quantised(kind)):
        supported = ", ".join([*PLAIN_TYPES, *(kind.name for kind in GGMLQuantizationType if _is_quantised(kind))])
        raise BadInput(f"{path}: {info.name} has the type {type_name}; supported are {supported}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    *rows, width = info.shape or (1,)
    if width % block:
        raise ValueError(f"{info.name} has rows of {width} numbers in blocks of {block}")
    byte_shape = (*rows, width // block * block_bytes)
    position, size = start + info.offset, math.prod(byte_shape)
    if position + size > file_size:
        raise EOFError(f"{info.name} ends at byte {position + size:,} of {file_size:,}")

    def read() -> np.ndarray:
        stored = np.fromfile(path, np.uint8, size, offset=position)
        if len(stored) != size:
            raise BadInput(f"{path}: {info.name} cannot be read; the file has changed since it was opened")
        if type_name in PLAIN_TYPES:
            plain: np.ndarray = stored.view(PLAIN_TYPES[type_name]).reshape(info.shape)
            return plain
        blocks = stored.reshape(-1, block_bytes)
        numbers = np.empty((len(blocks), block), np.float32)
        step = AT_ONCE // block
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            # In one row, since the package goes through an array only 16 rows at a time.
            numbers[part] = dequantize(blocks[part].reshape(1, -1), kind).reshape(-1, block)
        return numbers.reshape(info.shape)

    return LazyTensor(info.shape, PLAIN_TYPES.get(type_name, np.dtype(np.float32)), read)
