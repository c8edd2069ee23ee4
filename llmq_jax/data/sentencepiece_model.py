"""A vocabulary of SentencePiece's BPE as the file `tokenizer.model`.

We read tokenizer.json alone, as transformers does. llama.cpp's converter looks here for scores, without which its GGUF
files cut words otherwise.

The file is one message of Protocol Buffers, `ModelProto` of google/sentencepiece (src/sentencepiece_model.proto): a
sequence of fields, each a number with a kind of coding in its lowest three bits, then the value.
"""

import struct
from collections.abc import Iterable, Mapping

VARINT, BYTES, FLOAT = 0, 2, 5
"""Kinds of coding: 7 bits of an integer a byte, the lowest first; a length and as many bytes; four bytes."""
PIECES, TRAINER, NORMALIZER = 1, 2, 3
MODEL_TYPE, BYTE_FALLBACK = 3, 35
IDS = {"unk_token": 40, "bos_token": 41, "eos_token": 42, "pad_token": 43}
BPE = 2


def sentencepiece_model(
    pieces: Iterable[tuple[str, float, int]], ids: Mapping[str, int | None], add_dummy_prefix: bool
) -> bytes:
    """The file of these pieces: (text, score, kind), kinds numbered as in GGUF files, which have them from here.

    ids: of the tokens that IDS names; None for one that there is not. add_dummy_prefix: whether a text gets a space
    before its first word.
    """
    fields = [
        _bytes(PIECES, _bytes(1, text.encode()) + _key(2, FLOAT) + struct.pack("<f", score) + _integer(3, kind))
        for text, score, kind in pieces
    ]
    special = b"".join(_integer(number, -1 if (i := ids[name]) is None else i) for name, number in IDS.items())
    fields.append(_bytes(TRAINER, _integer(MODEL_TYPE, BPE) + _integer(BYTE_FALLBACK, 1) + special))
    # Name, whether a space is put before a text, whether repeated spaces become one, whether spaces become "▁".
    spaces = _integer(3, add_dummy_prefix) + _integer(4, False) + _integer(5, True)
    fields.append(_bytes(NORMALIZER, _bytes(1, b"identity") + spaces))
    return b"".join(fields)


def _varint(number: int) -> bytes:
    number %= 2**64  # as negative numbers are written
    coded = bytearray()
    while number > 127:
        coded.append(128 | number % 128)
        number //= 128
    return bytes([*coded, number])


def _key(number: int, coding: int) -> bytes:
    return _varint(number << 3 | coding)


def _integer(number: int, value: int) -> bytes:
    return _key(number, VARINT) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, BYTES) + _varint(len(value)) + value
