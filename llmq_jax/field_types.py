"""Values from JSON against the annotations of dataclass fields."""

import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any

from llmq_jax.errors import BadInput, did_you_mean


def has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value suits a field's annotation: an int is a fine float, a bool is no int."""
    if isinstance(hint, UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if (kind := typing.get_origin(hint)) in (list, tuple):
        return type(value) is kind and all(has_type(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int)


def type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)


def create(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of these fields; BadInput where there is no such field, or its value is of another type."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            known = did_you_mean(name, list(hints), count=1)
            raise BadInput(f"{kind.__name__.lower()}: there is no field {name!r}; {known}")
        if not has_type(value, hints[name]):
            raise BadInput(f"{kind.__name__.lower()}: {name}={value!r} is not of the type {type_name(hints[name])}")
    return kind(**values)
