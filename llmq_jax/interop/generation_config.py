"""What `generation_config.json` says: the tokens that end, begin and pad a text."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmq_jax.errors import BadInput

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class GenerationConfig:
    """Special tokens of a model; any of several end tokens ends a text."""

    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict)
    """The file's other fields, kept so that they are written back."""

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "GenerationConfig":
        """From `generation_config.json`, where the end token may be an id, a list of ids or null."""
        ids = {name: _ids(name, values.get(name)) for name in TOKEN_IDS}
        for name in ("bos_token_id", "pad_token_id"):
            if len(ids[name]) > 1:
                raise BadInput(f"{name}={values[name]!r} is not one token id")
        return cls(
            eos_token_id=ids["eos_token_id"],
            bos_token_id=next(iter(ids["bos_token_id"]), None),
            pad_token_id=next(iter(ids["pad_token_id"]), None),
            other={name: value for name, value in values.items() if name not in TOKEN_IDS},
        )

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


def _ids(name: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if ids == [-1]:  # how some published configs say that there is none
        return ()
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadInput(f"{name}={value!r} is neither a token id nor a list of token ids")
    return tuple(ids)
