"""Tokens on disk: made once, mapped into memory by every run, for text that is too much to read at each start.

A folder of tokens:

    tokens.json       how many there are, their digests, whether documents end with the end-of-text token
    training.bin      one stream of little-endian uint16 or uint32, as `encode_documents` joins documents
    validation.bin    the same of what is held out; missing where nothing is
    tokenizer/        the tokenizer's Hugging Face files
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmq_jax.atomic_files import naming
from llmq_jax.data.token_stream import encode_documents
from llmq_jax.data.tokenizer_loading import tokenizer_in
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput
from llmq_jax.field_types import create
from llmq_jax.json_text import parse_json
from llmq_jax.whole_folders import whole_folder

FACTS = "tokens.json"
VERSION = 1
PARTS = ("training", "validation")
DTYPES = ("uint16", "uint32")
SAMPLE_CHARACTERS = 10_000


@dataclass(frozen=True)
class StreamFacts:
    """What tokens.json says of one stream."""

    tokens: int
    largest_id: int
    sha256: str


@dataclass(frozen=True)
class Facts:
    """What tokens.json says of both streams together."""

    tokenizer: str
    """Its name."""
    dtype: str
    separated: bool
    """Whether an end-of-text token stands after each document; a single text has none."""
    sample: str
    """A part of the text. A tokenizer that encodes it as `sample_tokens` is taken for the one that made the tokens."""
    sample_tokens: str
    about: dict[str, Any]
    """Further facts from whoever wrote the tokens."""


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """A folder of tokens, as `read_tokens` finds it."""

    folder: Path
    facts: Facts
    streams: dict[str, StreamFacts]
    """Of "training", and of "validation" where a part is held out. The digests were taken when the files were written
    and are not checked, which would take reading all of them."""
    training: np.ndarray
    """[N], mapped from its file: only what is used is read."""
    validation: np.ndarray | None
    """[M], what is held out; None where nothing is."""

    @property
    def largest_id(self) -> int:
        """The largest id in both streams; a model's vocabulary must be greater."""
        return max(stream.largest_id for stream in self.streams.values())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that made the tokens."""
        tokenizer = tokenizer_in(self.folder / "tokenizer", self.facts.tokenizer)
        if tokenizer is None:
            raise BadInput(f"{self.folder / 'tokenizer'} holds no tokenizer; prepare the text again")
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """BadInput unless the tokenizer makes the same tokens of the sample of text that is kept with them."""
        if _sample_tokens(tokenizer, self.facts.sample, self.facts.separated) != self.facts.sample_tokens:
            raise BadInput(
                f"{self.folder} holds tokens of the tokenizer {self.facts.tokenizer}, and {tokenizer.name} makes "
                "others of the same text; prepare the text again with the model's own tokenizer"
            )


class _Refused(BadInput):
    """A refusal whose message is complete: `read_tokens` adds nothing to it."""


def is_token_folder(path: str | Path | None) -> bool:
    """Whether there is a folder that `write_tokens` wrote."""
    return path is not None and Path(path, FACTS).is_file() and Path(path, "training.bin").exists()


def read_tokens(folder: str | Path) -> TokenFiles:
    """The tokens of a folder that `write_tokens` wrote. BadInput: a file is missing, cut off, or of another version."""
    folder = Path(folder)
    try:
        said = parse_json((folder / FACTS).read_bytes())
        if (version := said.pop("version")) != VERSION:
            raise _Refused(f"{folder / FACTS} is of version {version}; prepare the text again")
        streams = said.pop("streams")
        facts = create(Facts, said)
        parts = {name: create(StreamFacts, streams[name]) for name in PARTS if name == "training" or name in streams}
        arrays = {name: _mapped(folder / f"{name}.bin", stream.tokens, facts.dtype) for name, stream in parts.items()}
    except _Refused:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder} cannot be read as tokens ({error!r:.200}); prepare the text again") from None
    return TokenFiles(folder, facts, parts, arrays["training"], arrays.get("validation"))


def _mapped(path: Path, count: int, dtype: str) -> np.ndarray:
    if dtype not in DTYPES:
        raise _Refused(f"{path} is of the type {dtype!r}, not {' or '.join(DTYPES)}; prepare the text again")
    expected = count * np.dtype(dtype).itemsize
    size = path.stat().st_size
    if size != expected or not size:
        raise _Refused(f"{path} has {size:,} bytes, not the {expected:,} of {count:,} tokens; copy or prepare it again")
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")


def write_tokens(
    folder: str | Path,
    tokenizer: Tokenizer,
    training: Iterable[np.ndarray],
    validation: Iterable[np.ndarray] | None,
    *,
    separated: bool,
    sample: str,
    about: dict[str, Any] | None = None,
) -> TokenFiles:
    """Write a new folder, which appears complete or not at all. Streams come in pieces [n], of which one at a time is
    in memory.

    separated: whether documents end with the end-of-text token. sample: a part of the text, by which `check_tokenizer`
    recognises the tokenizer. about: further facts for tokens.json. BadInput: the folder exists, or there is no token.
    """
    folder = Path(folder).resolve()
    check_new(folder)
    sample = sample[:SAMPLE_CHARACTERS]
    with whole_folder(folder) as partial:
        streams = {"training": _write(partial / "training.bin", training, tokenizer.dtype)}
        if validation is not None:
            streams["validation"] = _write(partial / "validation.bin", validation, tokenizer.dtype)
        tokens = _sample_tokens(tokenizer, sample, separated)
        facts = Facts(tokenizer.name, tokenizer.dtype.name, separated, sample, tokens, about or {})
        said = {"version": VERSION, "streams": {name: asdict(stream) for name, stream in streams.items()}}
        said |= asdict(facts)
        tokenizer.save(partial / "tokenizer")
        (partial / FACTS).write_text(json.dumps(said, indent=2) + "\n")
        check_new(folder)  # somebody else may have been faster
    return read_tokens(folder)


def check_new(folder: str | Path) -> None:
    """BadInput where the folder is there already."""
    if Path(folder).exists():
        raise BadInput(f"{folder} exists already, and tokens go into a new folder; choose another name or remove it")


def _write(path: Path, pieces: Iterable[np.ndarray], dtype: np.dtype) -> StreamFacts:
    digest, count, largest, most = hashlib.sha256(), 0, 0, np.iinfo(dtype).max
    with naming(path), path.open("wb") as file:
        for piece in pieces:
            if piece.min(initial=0) < 0 or piece.max(initial=0) > most:
                raise BadInput(f"token ids from {piece.min()} to {piece.max()} do not fit {dtype.name}")
            data = piece.astype(dtype.newbyteorder("<"), copy=False).tobytes()
            file.write(data)
            digest.update(data)
            count += len(piece)
            largest = max(largest, int(piece.max(initial=0)))
        file.flush()
        os.fsync(file.fileno())
    if not count:
        raise BadInput(f"there is no token to write to {path.name}: the text is empty")
    return StreamFacts(count, largest, digest.hexdigest())


def _sample_tokens(tokenizer: Tokenizer, text: str, separated: bool) -> str:
    return " ".join(map(str, encode_documents(tokenizer, [text], append_end_of_text=separated)))
