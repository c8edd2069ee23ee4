"""TensorFlow checkpoints, read without TensorFlow.

A checkpoint is an index (`model.ckpt.index`) and the bytes of all tensors one after another, in one file or several
(`model.ckpt.data-00000-of-00001`). The index is a sorted table in LevelDB's format [1]: blocks of entries from name to
description, in which each name omits the prefix that it shares with the one before, and one more block that says where
the blocks are. A description is a protobuf message, `BundleEntryProto` [2]: type, shape, file, offset, size, checksum.

Every block and every tensor carries a CRC-32C, and all are verified. Tensors are read one at a time, when asked for.

[1] https://github.com/google/leveldb/blob/main/doc/table_format.md
[2] tensorflow/core/protobuf/tensor_bundle.proto
"""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import ml_dtypes
import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.interop.tables import LazyTensor
from llmq_jax.interop.tensor_files import TensorFiles, damaged

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER = 48  # two handles, padding and the magic number
UNCOMPRESSED = 0
LITTLE_ENDIAN = 0

# tensorflow/core/framework/types.proto
DTYPES = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float64),
    3: np.dtype(np.int32),
    4: np.dtype(np.uint8),
    5: np.dtype(np.int16),
    6: np.dtype(np.int8),
    9: np.dtype(np.int64),
    10: np.dtype(bool),
    14: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(np.uint16),
    19: np.dtype(np.float16),
    22: np.dtype(np.uint32),
    23: np.dtype(np.uint64),
}

Message = dict[int, list[Any]]
"""A protobuf message without its schema: {field number: all its values}, integers or bytes."""


class Entry(NamedTuple):
    """Type, shape and place of a tensor, and its checksum."""

    dtype: np.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


def open_tensorflow(index: Path) -> TensorFiles:
    """The tensors of the checkpoint that has this `.index` file; the files with their values lie beside it."""
    try:
        entries = dict(_table(index.read_bytes()))
        header = _message(entries.pop(b""))
        shards, endianness = _number(header, 1), _number(header, 2)
        tensors = {name.decode(): _entry(index, name.decode(), _message(value)) for name, value in entries.items()}
    except BadInput:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise damaged(index, "the index of a TensorFlow checkpoint", error) from error
    if endianness != LITTLE_ENDIAN:
        raise BadInput(f"{index}: was written on a big-endian machine, which is not supported")
    prefix = str(index).removesuffix(".index")
    files = {shard: Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}") for shard in {e.shard for e in tensors.values()}}
    missing = sorted(file.name for file in files.values() if not file.is_file())
    if missing:
        raise BadInput(f"{index}: {len(missing)} of its {shards} data files are not there: {', '.join(missing[:5])}")
    by_file: dict[Path, dict[str, LazyTensor]] = {file: {} for file in files.values()}
    for name, entry in tensors.items():
        file = files[entry.shard]
        by_file[file][name] = _lazy(file, name, entry)
    return TensorFiles(by_file)


def _lazy(file: Path, name: str, entry: Entry) -> LazyTensor:
    end, length = entry.offset + entry.size, file.stat().st_size
    if end > length:
        raise BadInput(f"{file}: is truncated: {name} ends at byte {end}, and the file at {length}; get it again")

    def read() -> np.ndarray:
        with file.open("rb") as opened:
            opened.seek(entry.offset)
            content = opened.read(entry.size)
        if _checksum(content) != entry.checksum:
            raise BadInput(f"{file}: the checksum of {name} is wrong, so the file is damaged; get it again")
        return np.frombuffer(content, entry.dtype).reshape(entry.shape)

    return LazyTensor(entry.shape, entry.dtype, read)


def _entry(index: Path, name: str, message: Message) -> Entry:
    """The entry in a message `BundleEntryProto`."""
    number = _number(message, 1)
    if number not in DTYPES:
        raise BadInput(f"{index}: {name} has the type {number} of TensorFlow's DataType, which is not supported")
    if 7 in message:
        raise BadInput(f"{index}: {name} is stored in slices (a partitioned variable), which is not supported")
    dimensions = _message(message[2][0]).get(2, []) if 2 in message else []
    shape = tuple(_number(_message(dimension), 1) for dimension in dimensions)
    entry = Entry(DTYPES[number], shape, *(_number(message, field) for field in (3, 4, 5, 6)))
    if entry.size != math.prod(shape) * entry.dtype.itemsize:
        raise ValueError(f"{name} has {entry.size} bytes, which do not fit its shape {list(shape)}")
    return entry


def _table(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) entries of a table, in order."""
    footer = file[-FOOTER:]
    if len(footer) < FOOTER or not footer.endswith(MAGIC):
        raise ValueError("it does not end with the table's magic number")
    handles = io.BytesIO(footer)
    metadata, blocks = _handle(handles), _handle(handles)
    list(_block(file, *metadata))  # empty, but its checksum counts too
    for _, handle in _block(file, *blocks):
        yield from _block(file, *_handle(io.BytesIO(handle)))


def _block(file: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block, whose checksum is verified, with the shared prefixes of keys restored."""
    end = offset + size
    content, kind, checksum = file[offset:end], file[end : end + 1], file[end + 1 : end + 5]
    if len(checksum) < 4 or _checksum(content + kind) != int.from_bytes(checksum, "little"):
        raise ValueError(f"the checksum of the block at byte {offset} is wrong")
    if kind[0] != UNCOMPRESSED:
        raise ValueError(f"the block at byte {offset} is compressed, which is not supported")
    # The block ends with the positions at which keys are complete, for searching, and their number.
    restarts = int.from_bytes(content[-4:], "little")
    stream, end, key = io.BytesIO(content), len(content) - 4 * (restarts + 1), b""
    while stream.tell() < end:
        shared, rest, length = _varint(stream), _varint(stream), _varint(stream)
        key = key[:shared] + _bytes(stream, rest)
        yield key, _bytes(stream, length)


def _handle(stream: io.BytesIO) -> tuple[int, int]:
    """(offset, size) of a block."""
    return _varint(stream), _varint(stream)


def _message(data: bytes) -> Message:
    """A protobuf message: https://protobuf.dev/programming-guides/encoding."""
    fields: Message = {}
    stream = io.BytesIO(data)
    value: int | bytes
    while stream.tell() < len(data):
        tag = _varint(stream)
        kind = tag & 7
        if kind == 0:
            value = _varint(stream)
        elif kind in (1, 5):  # 64 and 32 bits
            value = int.from_bytes(_bytes(stream, 8 if kind == 1 else 4), "little")
        elif kind == 2:
            value = _bytes(stream, _varint(stream))
        else:
            raise ValueError(f"a field has the wire type {kind}, which protobuf does not use")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(message: Message, field: int) -> int:
    """An integer field; zeros are not written."""
    value = message.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is no number")
    return value


def _varint(stream: io.BytesIO) -> int:
    """An integer: seven bits a byte, the lowest first; the top bit says that more follow."""
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = _bytes(stream, 1)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("an integer is longer than 64 bits")


def _bytes(stream: io.BytesIO, length: int) -> bytes:
    if stream.tell() + length > stream.getbuffer().nbytes:
        raise ValueError("it ends in the middle of an entry")
    return stream.read(length)


def _checksum(content: bytes) -> int:
    """CRC-32C as TensorFlow stores it: rotated, and with a constant added, since the CRC of data that contains CRCs is
    weak."""
    value: int = google_crc32c.value(content)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
