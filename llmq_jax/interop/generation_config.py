"""What `generation_config.json` says: the tokens that end, begin and pad a text."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq_jax.errors import BadInput, PythonAdvice, at_place, warn
from llmq_jax.field_types import scalar
from llmq_jax.interop.tensor_files import read_json

GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields by which transformers chooses other tokens and that nothing here applies, with the values that change nothing.
# How tokens are drawn (temperature, top_k, ...) is not among them: a Sampler says it. So it does of repetition_penalty,
# but transformers applies that to greedy tokens too.
IGNORED: dict[str, Any] = {
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "stop_strings": None,
    "num_beams": 1,
}


@dataclass(frozen=True)
class GenerationConfig:
    """Special tokens of a model; any of several end tokens ends a text. One may be given as a number, as in
    `generation_config.json`."""

    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict)
    """The file's other fields, kept so that they are written back."""

    def __post_init__(self) -> None:
        for name in TOKEN_IDS:
            value = getattr(self, name)
            ids = _ids(name, value)
            if name != "eos_token_id" and len(ids) > 1:
                raise BadInput(f"{name}={value!r} is not one token id")
            object.__setattr__(self, name, ids if name == "eos_token_id" else next(iter(ids), None))

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "GenerationConfig":
        """From `generation_config.json`, where the end token may be an id, a list of ids or null."""
        ids: dict[str, Any] = {name: values.get(name) for name in TOKEN_IDS}
        return cls(**ids, other={name: value for name, value in values.items() if name not in TOKEN_IDS})

    @classmethod
    def of_one_token(cls, end: int | None, vocab_size: int) -> "GenerationConfig":
        """As in GPT-2: the same token ends and begins a text; none where the vocabulary does not have it."""
        if end is None or end >= vocab_size:
            return cls()
        return cls(eos_token_id=(end,), bos_token_id=end)

    @property
    def repetition_penalty(self) -> Any:
        """What the file says of it, unchecked; 1.0 where that is nothing."""
        said = self.other.get("repetition_penalty")
        return 1.0 if said is None else said

    def token_ids(self) -> dict[str, Any]:
        """The special tokens as transformers writes them: null, an id or, for several end tokens, a list."""
        ends = list(self.eos_token_id)
        return {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (ends[0] if len(ends) == 1 else ends) if ends else None,
            "pad_token_id": self.pad_token_id,
        }

    def to_hf(self) -> dict[str, Any]:
        """`generation_config.json` as a dict."""
        named = {name: value for name, value in self.token_ids().items() if value is not None}
        return {**self.other, **named}

    def replace(self, **changes: Any) -> "GenerationConfig":
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_end(self, token: int | None) -> "GenerationConfig":
        """The same, with this token among those that end a text."""
        if token is None or token in self.eos_token_id:
            return self
        return self.replace(eos_token_id=(*self.eos_token_id, token))


def read_generation_config(folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The fields of a folder's `generation_config.json`; None where there is no such file. Those that have no effect
    here are named in a warning, except such as `known` has with the same value, of which the user was told."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return None
    values, known = read_json(path), known or {}
    with at_place(path):
        GenerationConfig.from_hf(values)
    warn_of_ignored({name: value for name, value in values.items() if known.get(name) != value}, path)
    return values


def warn_of_ignored(values: Mapping[str, Any], file: Path) -> None:
    """Name those of the file's fields that change what transformers generates, and nothing here."""
    said = {name: values.get(name) for name in IGNORED}
    found = [f"{name}={value!r:.60}" for name, value in said.items() if value not in (None, IGNORED[name], [], {})]
    if found:
        warn(f"{file}: ignored in generation: {', '.join(found)}")
    if (penalty := values.get("repetition_penalty")) not in (None, 1.0):
        given = f"repetition_penalty={penalty!r:.60}"
        warn(f"{file}: asks for {given}, which is not applied; give Sampler({given})", PythonAdvice)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    value = scalar(value)
    several = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1
    ids = [scalar(i) for i in value] if several else [] if value is None else [value]
    if ids == [-1]:  # how some published configs say that there is none
        return ()
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadInput(f"{name}={value!r} is neither a token id nor a list of token ids")
    return tuple(ids)
