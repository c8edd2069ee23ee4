"""The format of GGUF files: every type of tensor, metadata, and files that are broken."""

import random
import struct

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from llmq_jax.errors import BadInput
from llmq_jax.interop.gguf_files import AT_ONCE, open_gguf
from llmq_jax.model_files import load
from tests.interop.llama_cpp import add_vocabulary, make_model, refused, write, write_llama

# Types and, where the package can quantise, how far their numbers may be from those that were stored.
ERRORS = {"Q8_0": 0.02, "Q5_0": 0.2, "Q5_1": 0.2, "Q4_0": 0.4, "Q4_1": 0.4, "TQ1_0": 3.0, "TQ2_0": 3.0, "MXFP4": 1.0}
BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
BLOCKS += ["IQ4_NL", "IQ4_XS", "NVFP4"]


def stored_blocks(name: str, numbers: np.ndarray, rng) -> np.ndarray:
    """Bytes of a quantised tensor: of these numbers where the package can quantise, else any."""
    kind = GGMLQuantizationType[name]
    if name in ERRORS:
        return quantize(numbers, kind)
    block, size = GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (len(numbers), numbers.shape[1] // block * size), np.uint8)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # blocks of any bytes have any scales
def test_tensors_of_all_types(tmp_path):
    """Numbers as the package `gguf` works them out, in PyTorch's shapes; types that are not quantised are kept."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((3, 5)).astype(np.float32)
    plain = {"F32": numbers, "F16": numbers.astype(np.float16), "BF16": numbers.astype(ml_dtypes.bfloat16)}
    path = tmp_path / "types.gguf"
    writer = GGUFWriter(path, "llama")
    for name, array in plain.items():
        raw = array.view(np.uint8) if name == "BF16" else array
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[name])
    wide = rng.standard_normal((4, 512)).astype(np.float32)
    blocks = {name: stored_blocks(name, wide, rng) for name in (*ERRORS, *BLOCKS)}
    for name, raw in blocks.items():
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[name])
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    write(writer)

    tensors = open_gguf(path).tensors
    assert set(tensors) == {*plain, *blocks, "vector"}
    for name, array in plain.items():
        assert (tensors[name].shape, tensors[name].dtype) == ((3, 5), array.dtype)
        np.testing.assert_array_equal(np.asarray(tensors[name]), array)
    for name, raw in blocks.items():
        expected = dequantize(raw, GGMLQuantizationType[name])
        assert np.unique(expected).size > 2
        assert (tensors[name].shape, tensors[name].dtype) == ((4, 512), np.float32)
        np.testing.assert_array_equal(np.asarray(tensors[name]), expected)
        if name in ERRORS:
            np.testing.assert_allclose(np.asarray(tensors[name]), wide, atol=ERRORS[name])
    np.testing.assert_array_equal(np.asarray(tensors["vector"]), np.arange(7))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_tensors_of_more_numbers_than_are_worked_out_at_a_time(tmp_path):
    """Three axes, and the last part is shorter than the others."""
    rng = np.random.default_rng(0)
    raw = stored_blocks("Q5_K", np.empty((3 * 130, 1024)), rng).reshape(3, 130, -1)
    path = tmp_path / "large.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("large", raw, raw_dtype=GGMLQuantizationType.Q5_K)
    write(writer)
    found = open_gguf(path).tensors["large"]
    assert found.shape == (3, 130, 1024)
    assert 3 * 130 * 1024 % AT_ONCE > 0 < 3 * 130 * 1024 // AT_ONCE
    np.testing.assert_array_equal(np.asarray(found), dequantize(raw, GGMLQuantizationType.Q5_K))


def test_metadata_are_plain_values(tmp_path):
    path = tmp_path / "metadata.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_float32("epsilon", 1e-5)
    writer.add_float64("wide", 0.1)
    writer.add_bool("yes", True)
    writer.add_int8("negative", -3)
    writer.add_uint64("large", 2**63)
    writer.add_string("text", "naïve 你好")
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("fractions", [0.5, -1.0])
    write(writer)
    metadata = open_gguf(path).metadata
    assert metadata == {
        "general.architecture": "llama",
        "epsilon": 1e-5,
        "wide": 0.1,
        "yes": True,
        "negative": -3,
        "large": 2**63,
        "text": "naïve 你好",
        "texts": ["a", "", "ü"],
        "numbers": [1, -2, 3],
        "fractions": [0.5, -1.0],
    }
    assert type(metadata["yes"]) is bool


@pytest.mark.parametrize("name", ["Q8_K", "Q1_0", "I32", "F64"])
def test_unsupported_types_are_named_before_anything_is_read(tmp_path, name):
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("fine", np.zeros(32, np.float32))
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    writer.add_tensor("odd.weight", np.zeros((2, size * 256 // block), np.uint8), raw_dtype=kind)
    write(writer)
    message = refused(open_gguf, path)
    assert f"odd.weight has the type {name}; supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2" in message
    assert {*message.split("supported are ")[1].split(", ")} >= {"F32", "F16", "BF16", *ERRORS, *BLOCKS}


# Files that are broken.


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The bytes of a small model."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_llama(path, make_model(), add_vocabulary)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a GGUF file, or truncated or damaged"),
        (b"GGUF", "the header goes on to byte 8 of 4"),
        (b"PK\x03\x04" + bytes(100), "it does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(50), "is GGUF of version 1, which is not supported"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(50), "is written for big-endian machines"),
        (
            b"GGUF" + struct.pack("<IQQQ17sII", 3, 0, 1, 17, b"general.alignment", 4, 0),
            "truncated or damaged (general.alignment is 0)",
        ),
    ],
)
def test_files_of_another_kind(tmp_path, content, reason):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    assert reason in refused(load, path)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little") + value


LENGTH = (2**60).to_bytes(8, "little")
UINT8, STRING, ARRAY = 0, 8, 9


@pytest.mark.parametrize(
    "pairs",
    [
        pair(b"key", STRING, LENGTH),
        pair(b"key", ARRAY, UINT8.to_bytes(4, "little") + LENGTH),
        pair(b"key", ARRAY, STRING.to_bytes(4, "little") + LENGTH),
        pair(b"key", ARRAY, ARRAY.to_bytes(4, "little") + LENGTH) + bytes(12) * 100,
        pair(b"key", 99, bytes(8)),
        LENGTH,
        pair(b"key", UINT8, b"1") * 2,
        pair(b"\xff\xfe", UINT8, b"1"),
    ],
    ids=["string", "array", "strings", "nested", "type", "key", "double", "encoding"],
)
def test_lengths_are_held_against_the_size_of_the_file(tmp_path, pairs):
    path = tmp_path / "file.gguf"
    counts = bytes(8) + LENGTH
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + pairs)
    assert "not a GGUF file, or truncated or damaged" in refused(load, path)


def test_truncated_files(intact, tmp_path):
    path = tmp_path / "file.gguf"
    for size in [*range(0, len(intact) - 32, 2003), len(intact) - 100, len(intact) - 32]:
        path.write_bytes(intact[:size])
        assert "not a GGUF file, or truncated or damaged (" in refused(load, path)


def test_damaged_headers(intact, tmp_path):
    """Any byte of the header changed: the file is read or refused in one line, whatever the byte says."""
    rng = random.Random(0)
    path = tmp_path / "file.gguf"
    seen = 0
    for _ in range(150):
        damaged = bytearray(intact)
        damaged[rng.randrange(8, 6000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except BadInput as error:
            seen += 1
            assert "\n" not in str(error)
    assert seen > 15


def test_a_file_that_shrinks_after_it_was_opened(intact, tmp_path):
    path = tmp_path / "file.gguf"
    path.write_bytes(intact)
    tensors = open_gguf(path).tensors
    path.write_bytes(intact[:-5000])
    with pytest.raises(BadInput, match="the file has changed since it was opened"):
        [np.asarray(tensor) for tensor in tensors.values()]
