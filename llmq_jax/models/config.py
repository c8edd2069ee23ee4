"""Validation shared by the config dataclasses."""

import typing
from typing import Any

from llmq_jax.errors import BadInput


def require(condition: bool, config: object, field: str, rule: str):
    """Raise BadInput that names the field, its value and the rule it breaks."""
    if not condition:
        raise BadInput(f"{type(config).__name__}.{field}={getattr(config, field)!r} {rule}")


def has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value suits a field's annotation; an int is a fine float, a bool is no int."""
    options = typing.get_args(hint) or (hint,)
    return type(value) in options or (float in options and type(value) is int)


def type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
