"""Validation shared by the config dataclasses."""

import types
import typing
from typing import Any

from llmq_jax.errors import BadInput


def require(condition: bool, config: object, field: str, rule: str):
    """Raise BadInput that names the field, its value and the rule it breaks."""
    if not condition:
        raise BadInput(f"{type(config).__name__}.{field}={getattr(config, field)!r} {rule}")


def has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value suits a field's annotation: an int is a fine float, a bool is no int."""
    if isinstance(hint, types.UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if (kind := typing.get_origin(hint)) in (list, tuple):
        return type(value) is kind and all(has_type(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int)


def type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
