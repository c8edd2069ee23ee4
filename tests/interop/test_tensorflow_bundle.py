"""TensorFlow checkpoints: those in `data/`, which TensorFlow wrote, and indexes made here that are odd or broken."""

import os
import shutil
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.interop.tensorflow_bundle import FOOTER, MAGIC, open_tensorflow
from tests.interop.data.make_openai_checkpoint import draw, openai_variables, typed_variables
from tests.interop.refusals import refused

DATA = Path(__file__).parent / "data"
INDEX = "model.ckpt.index"


def read(index: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in open_tensorflow(index).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].shape, found[name].dtype) == (np.shape(values), values.dtype), name
        np.testing.assert_array_equal(np.asarray(found[name]), values, err_msg=name)


@pytest.mark.parametrize("folder", ["openai_gpt2", "sharded"])
def test_what_tensorflow_wrote_in_one_file_and_in_two(folder):
    tensors = open_tensorflow(DATA / folder / INDEX)
    assert_equal(tensors, openai_variables())
    files = {tensors.file_of(name).name for name in tensors}
    count = 2 if folder == "sharded" else 1
    assert files == {f"model.ckpt.data-{shard:05d}-of-{count:05d}" for shard in range(count)}


def test_types():
    expected = {**typed_variables(), "bfloat16": draw("bfloat16", (3, 2)).astype(ml_dtypes.bfloat16)}
    assert_equal(open_tensorflow(DATA / "types" / INDEX), expected)


# Files that are broken.


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(DATA / "sharded", tmp_path / "sharded"))


def flip(path: Path, position: int):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_a_data_file_with_one_bit_flipped(sharded, position):
    file = sharded / "model.ckpt.data-00001-of-00002"
    flip(file, position)
    message = refused(read, sharded / INDEX)
    assert message.startswith(f"{file}: the checksum of model/")
    assert message.endswith("is wrong, so the file is damaged; get it again")


def test_other_tensors_of_a_damaged_file_can_be_read(sharded):
    flip(sharded / "model.ckpt.data-00001-of-00002", 0)
    tensors = open_tensorflow(sharded / INDEX)
    name = next(name for name in tensors if tensors.file_of(name).name.endswith("00000-of-00002"))
    np.testing.assert_array_equal(np.asarray(tensors[name]), openai_variables()[name])


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_data_files_are_found_before_anything_is_read(sharded, size):
    file = sharded / "model.ckpt.data-00000-of-00002"
    length = file.stat().st_size
    os.truncate(file, size if size >= 0 else length - 1)
    with pytest.raises(BadInput, match=r"is truncated: model/.* ends at byte .*, and the file at") as caught:
        open_tensorflow(sharded / INDEX)
    assert str(caught.value).startswith(f"{file}: ")


def test_missing_data_files(sharded):
    (sharded / "model.ckpt.data-00001-of-00002").unlink()
    message = refused(read, sharded / INDEX)
    assert message == f"{sharded / INDEX}: 1 of its 2 data files are not there: model.ckpt.data-00001-of-00002"


@pytest.mark.parametrize("position", [0, 1, 40, 600, -60, -48, -1])
def test_an_index_with_one_bit_flipped(sharded, position):
    flip(sharded / INDEX, position)
    message = refused(read, sharded / INDEX)
    assert message.startswith(f"{sharded / INDEX}: not the index of a TensorFlow checkpoint, or truncated or damaged (")


def test_every_byte_of_an_index_counts(sharded):
    """All but the footer's padding, without which the index still says the same."""
    content = (sharded / INDEX).read_bytes()
    whole = open_tensorflow(sharded / INDEX)
    expected = {name: (tensor.shape, tensor.dtype, whole.file_of(name)) for name, tensor in whole.items()}
    for position in [*range(0, len(content) - 120, 11), *range(len(content) - 120, len(content))]:
        (sharded / INDEX).write_bytes(content)
        flip(sharded / INDEX, position)
        try:
            found = open_tensorflow(sharded / INDEX)
        except BadInput:
            continue
        assert len(content) - FOOTER <= position < len(content) - 8, position
        assert {name: (tensor.shape, tensor.dtype, found.file_of(name)) for name, tensor in found.items()} == expected


@pytest.mark.parametrize("size", [0, 1, 47, 48, 500, -1])
def test_a_truncated_index(sharded, size):
    length = (sharded / INDEX).stat().st_size
    os.truncate(sharded / INDEX, size if size >= 0 else length - 1)
    assert "truncated or damaged (it does not end with the table's magic number)" in refused(read, sharded / INDEX)


def test_git_lfs_pointer(sharded):
    (sharded / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "is a Git LFS pointer; run `git lfs pull`" in refused(read, sharded / INDEX)


# Indexes that TensorFlow did not write, with checksums that are right.


def varint(value: int) -> bytes:
    small = [value & 0x7F | 0x80 for value in (value >> shift for shift in range(0, value.bit_length(), 7))] or [0]
    return bytes([*small[:-1], small[-1] & 0x7F])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def nested(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def checksum(content: bytes) -> bytes:
    value = google_crc32c.value(content)
    return (((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def entry(values: np.ndarray, dtype=1, shape=None, offset=0, size=None, more=b"") -> bytes:
    dimensions = b"".join(nested(2, number(1, length)) for length in shape or values.shape)
    size = values.nbytes if size is None else size
    mark = varint(6 << 3 | 5) + checksum(values.tobytes())
    return number(1, dtype) + nested(2, dimensions) + number(4, offset) + number(5, size) + mark + more


def write_index(folder: Path, entries: dict[bytes, bytes], header=b"\x08\x01", a_block=100, kind=b"\0") -> Path:
    """A table whose blocks hold `a_block` entries each; keys are shortened within a block."""
    file, handles = b"", []

    def add_block(pairs) -> bytes:
        nonlocal file
        content, before = b"", b""
        for key, value in pairs:
            shared = next((i for i, (left, right) in enumerate(zip(before, key, strict=False)) if left != right), 0)
            content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            before = key
        content += bytes(4) + (1).to_bytes(4, "little")  # one restart, at the beginning
        handle = varint(len(file)) + varint(len(content))
        file += content + kind + checksum(content + kind)
        return handle

    pairs = sorted({b"": header, **entries}.items())
    for start in range(0, len(pairs), a_block):
        handles.append((pairs[min(start + a_block, len(pairs)) - 1][0], add_block(pairs[start : start + a_block])))
    footer = add_block([]) + add_block(handles)
    (folder / INDEX).write_bytes(file + footer.ljust(FOOTER - 8, b"\0") + MAGIC)
    return folder / INDEX


@pytest.fixture
def values(tmp_path):
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(values.tobytes())
    return values


def test_several_blocks(tmp_path, values):
    """TensorFlow begins a new block after 256 KB, which no index of a GPT-2 reaches."""
    parts = {f"layer/{index}/w": values[index:] for index in range(6)}
    entries = {name.encode(): entry(part, offset=values.nbytes - part.nbytes) for name, part in parts.items()}
    for a_block in (1, 2, 3, 100):
        assert_equal(open_tensorflow(write_index(tmp_path, entries, a_block=a_block)), parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (7,)}, "w has 24 bytes, which do not fit its shape [7]"),
        ({"shape": (2**63, 2)}, "w has 24 bytes, which do not fit its shape"),
        ({"size": 2**40, "shape": (2**38,)}, "is truncated: w ends at byte 1099511627776, and the file at 24"),
        ({"offset": 4}, "is truncated: w ends at byte 28, and the file at 24"),
        ({"dtype": 7}, "w has the type 7 of TensorFlow's DataType, which is not supported"),
        ({"more": nested(7, b"")}, "w is stored in slices (a partitioned variable), which is not supported"),
        ({"more": b"\x0b"}, "a field has the wire type 3"),
        ({"more": b"\x12\x09short"}, "it ends in the middle of an entry"),
        ({"more": b"\x20" + b"\xff" * 11}, "an integer is longer than 64 bits"),
        ({"more": nested(4, b"four")}, "field 4 is no number"),
    ],
)
def test_entries_that_make_no_sense(tmp_path, values, changes, message):
    assert message in refused(read, write_index(tmp_path, {b"w": entry(values, **changes)}))


def test_indexes_that_make_no_sense(tmp_path, values):
    entries = {b"w": entry(values)}
    assert list(open_tensorflow(write_index(tmp_path, entries))) == ["w"]
    big_endian = write_index(tmp_path, entries, header=b"\x08\x01\x10\x01")
    assert "written on a big-endian machine" in refused(read, big_endian)
    assert "the block at byte" in refused(read, write_index(tmp_path, entries, kind=b"\1"))
    of_two_files = write_index(tmp_path, entries, header=b"\x08\x02")
    assert "2 data files are not there: model.ckpt.data-00000-of-00002" in refused(read, of_two_files)
    assert "truncated or damaged" in refused(read, write_index(tmp_path, {b"\xff\xff": entry(values)}))
