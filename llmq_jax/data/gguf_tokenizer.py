"""The tokenizer that a GGUF file describes, as one of Hugging Face's `tokenizers`.

GGUF metadata holds a vocabulary, the kind of every token, merges or scores, and the name of the pre-tokenizer, which
cuts text into words; the rest of a `tokenizer.json` follows from these. Two kinds of tokenizer:

- `gpt2`, byte-level BPE: tokens are bytes spelled as characters, merges are listed. How the published tokenizers cut
  text into words is in `PRE_TOKENIZERS`.
- `llama`, SentencePiece's BPE: "▁" for spaces, one before the text, `<0x0A>` for bytes that are in no token. The pair
  whose token has the highest score is merged first, so the order of the scores is the order of the merges.

Source: ggml-org/llama.cpp (`src/llama-vocab.cpp`), and the published tokenizer.json files of GPT-2, Llama 2 and 3,
SmolLM2 and Qwen2.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmq_jax.data.sentencepiece_model import sentencepiece_model
from llmq_jax.data.tokenizers import FileTokenizer
from llmq_jax.errors import BadInput, warn

FLOAT32_MAX = float(np.finfo(np.float32).max)
CHAT_TEMPLATE = "tokenizer.chat_template"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens (`tokenizer.ggml.token_type`)."""
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""How a vocabulary of SentencePiece spells bytes."""

NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""{name in tokenizer_config.json: name in the metadata}."""


def _words(digits: str) -> str:
    """The pattern of Llama 3 and Qwen2, which differ in how many digits they keep together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level tokenizer cuts text into words, and what else comes with its name."""

    pattern: str | None = None
    """The regular expression that finds words; None is GPT-2's."""
    single_digits: bool = False
    """Whether every digit is a word, so that the pattern sees only what is between digits."""
    nfc: bool = False
    """Whether characters are composed first (Unicode's normal form C)."""
    ignore_merges: bool = False
    """Whether a word that is in the vocabulary becomes that one token, whatever the merges would give."""
    add_bos: bool = False
    """Whether the beginning token belongs before a text, where the file does not say."""


_GPT2 = PreTokenizer()
_LLAMA3 = PreTokenizer(_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(_words(r"\p{N}"), nfc=True)
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "kormo": _QWEN2,
}
"""By `tokenizer.ggml.pre`; names share a tokenizer as they do in llama.cpp."""


def gguf_tokenizer(metadata: Mapping[str, Any], name: str) -> FileTokenizer | None:
    """The tokenizer of a GGUF file's metadata, called `name`; None where there is none.

    BadInput: a tokenizer of a kind that is not supported, or metadata that do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if not isinstance(kind, str) or kind not in _BUILDERS:
        raise BadInput(f"tokenizer.ggml.model={kind!r:.60} is not supported, only {' and '.join(_BUILDERS)}")
    vocabulary = _Vocabulary(metadata)
    try:
        tokenizer = _BUILDERS[kind](vocabulary)
        _add_tokens(tokenizer, vocabulary)
        content = tokenizer.to_str().encode()
        of_pieces = kind == "llama" and not vocabulary.has("merges")
        model = vocabulary.sentencepiece_model() if of_pieces else None
    except BadInput:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"the tokenizer cannot be built ({error})") from error
    config = {
        # This class takes tokenizer.json as it is; the classes of architectures replace parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **vocabulary.named_tokens(),
    }
    if CHAT_TEMPLATE in metadata:
        config["chat_template"] = vocabulary.get(CHAT_TEMPLATE, str)
    files = {"tokenizer.json": content}
    if model is not None:
        files["tokenizer.model"] = model
        # In this file tokens of a user are like others: what they are is said here, as in folders of the hub.
        added = json.loads(content)["added_tokens"]
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
        if not vocabulary.flag("add_space_prefix", True):
            config["add_prefix_space"] = False
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return FileTokenizer.from_files(files, name)


class _Vocabulary:
    """Tokens, their kinds and the special ones among them, checked."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata
        self.tokens = self._list("tokens", str)
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            double = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise BadInput(f"tokenizer.ggml.tokens holds {double!r} twice")
        self.named = {ours: self._token_id(theirs) for ours, theirs in NAMED_TOKENS.items()}
        if self.has("token_type"):
            self.kinds = self._list("token_type", int, len(self.tokens))
        else:
            self.kinds = [BYTE if token in BYTES else NORMAL for token in self.tokens]
            for number in self.named.values():
                if number is not None:
                    self.kinds[number] = CONTROL

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata; without a default it must be there."""
        value = self._metadata.get(key, default)
        if type(value) is not kind:
            raise BadInput(f"{key} is no {kind.__name__}" if key in self._metadata else f"the metadata lacks {key}")
        return value

    def has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self._metadata

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.get(f"tokenizer.ggml.{name}", bool, default))

    def named_tokens(self) -> dict[str, str]:
        """{"bos_token": "<s>", ...}, the special ones only: transformers would make any token named here special."""
        special = {name: i for name, i in self.named.items() if i is not None and self.is_special(i)}
        return {name: self.tokens[number] for name, number in special.items()}

    def is_special(self, number: int) -> bool:
        return self.kinds[number] in (CONTROL, UNKNOWN)

    def merges(self) -> list[tuple[str, str]]:
        """The merges that the file lists."""
        parts = (line.partition(" ") for line in self._list("merges", str))
        return [(left, right) for left, _, right in parts]

    def merges_by_score(self) -> list[tuple[str, str]]:
        """All pairs of tokens that join to a third token, ordered by its score, the highest first. Of pairs with equal
        scores llama.cpp joins the leftmost, so that a run of spaces, whose tokens have one score, grows from its left:
        as it does where longer tokens come first."""
        scores = self._scores()
        pairs = zip(self.tokens, self.kinds, strict=True)
        ordinary = {token for token, kind in pairs if kind in (NORMAL, USER_DEFINED)}
        lengths, merges = {len(token) for token in ordinary}, []
        for number in sorted(range(len(self.tokens)), key=lambda i: (-scores[i], -len(self.tokens[i]))):
            token = self.tokens[number]
            if token in ordinary:
                # Cut only where tokens may end: all cuts of a token of a million characters would never be done.
                cuts = [cut for cut in range(len(token) - 1, 0, -1) if {cut, len(token) - cut} <= lengths]
                halves = [(token[:cut], token[cut:]) for cut in cuts]
                merges += [(left, right) for left, right in halves if left in ordinary and right in ordinary]
        return merges

    def sentencepiece_model(self) -> bytes | None:
        """The vocabulary as SentencePiece's own file. None where that cannot say the same: no token is that of unknown
        text, not every byte has one, a token is empty or of no known kind, or one that a user defined has "▁" in it
        (there these come first, with "▁" for their spaces)."""
        unknown = self.named["unk_token"]
        if unknown is None:  # converters that take it for a control token do not name it either
            unknown = self.kinds.index(UNKNOWN) if UNKNOWN in self.kinds else self.ids.get("<unk>")
        bytes_there = {token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind == BYTE}
        if bytes_there != BYTES or "" in self.ids or not {*self.kinds} <= {*range(NORMAL, BYTE + 1)}:
            return None
        pieces = list[tuple[str, float, int]]()
        for number, (token, score, kind) in enumerate(zip(self.tokens, self._scores(), self.kinds, strict=True)):
            if kind == USER_DEFINED and "▁" in token:
                return None
            text = token.replace(" ", "▁") if kind == USER_DEFINED else token
            known = CONTROL if kind == UNKNOWN else kind  # there is one unknown token
            pieces.append((text, score, UNKNOWN if number == unknown else known))
        if unknown is None or len({text for text, *_ in pieces}) < len(pieces):
            return None
        return sentencepiece_model(pieces, self.named | {"unk_token": unknown}, self.flag("add_space_prefix", True))

    def _scores(self) -> list[float]:
        scores = self._list("scores", float, len(self.tokens))
        for token, score in zip(self.tokens, scores, strict=True):
            if not abs(score) <= FLOAT32_MAX:  # nor is nan
                raise BadInput(f"tokenizer.ggml.scores gives {token!r:.60} {score}, which is not finite in 32 bits")
        return scores

    def _list(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        key = f"tokenizer.ggml.{name}"
        values: list[Any] = self.get(key, list)
        if not values or not all(type(value) is kind for value in values):
            raise BadInput(f"{key} is no list of {kind.__name__}")
        if length is not None and len(values) != length:
            raise BadInput(f"{key} has {len(values)} entries for {length} tokens")
        return values

    def _token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._metadata:
            return None
        number: int = self.get(key, int)
        if not 0 <= number < len(self.tokens):
            raise BadInput(f"{key}={number} is outside the vocabulary of {len(self.tokens)} tokens")
        return number


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    name = vocabulary.get("tokenizer.ggml.pre", str, "")
    if not name:
        warn("no tokenizer.ggml.pre says how text is cut into words: it is as GPT-2 does")
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise BadInput(f"tokenizer.ggml.pre={name!r} is not supported, only {', '.join(PRE_TOKENIZERS)}")
    kind = PRE_TOKENIZERS[name]
    model = models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges(), ignore_merges=kind.ignore_merges)
    tokenizer = Tokenizer(model)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if kind.single_digits else []
    if kind.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(kind.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_template(tokenizer, vocabulary, kind.add_bos)
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    # Files made from a tokenizer.json hold its merges, and scores without a meaning.
    listed = vocabulary.has("merges")
    unknown = vocabulary.named["unk_token"]
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=vocabulary.merges() if listed else vocabulary.merges_by_score(),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decoding)
    _add_template(tokenizer, vocabulary, add_bos=True)
    return tokenizer


_BUILDERS: dict[str, Callable[[_Vocabulary], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_template(tokenizer: Tokenizer, vocabulary: _Vocabulary, add_bos: bool) -> None:
    """Set which tokens are added before and after a text: the beginning and end tokens, by the file's flags or else by
    default."""
    ends = []
    for name, default in (("bos", add_bos), ("eos", False)):
        number = vocabulary.named[f"{name}_token"]
        wanted = vocabulary.flag(f"add_{name}_token", default)
        ends.append([vocabulary.tokens[number]] if wanted and number is not None else [])
    before, after = ends
    if before or after:
        first, second = ([*before, text, *after] for text in ("$A", "$B"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *(f"{piece}:1" for piece in second)],
            special_tokens=[(token, vocabulary.ids[token]) for token in dict.fromkeys([*before, *after])],
        )


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add the tokens that are found in text as a whole: control tokens, which are special, and user-defined ones."""
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=vocabulary.is_special(number))
            for number, token in enumerate(vocabulary.tokens)
            if vocabulary.is_special(number) or vocabulary.kinds[number] == USER_DEFINED
        ]
    )
