"""Validation shared by the config dataclasses."""

from llmq_jax.errors import BadInput


def require(condition: bool, config: object, field: str, rule: str):
    """Raise BadInput that names the field, its value and the rule it breaks."""
    if not condition:
        raise BadInput(f"{type(config).__name__}.{field}={getattr(config, field)!r} {rule}")


def require_at_least(bound: int, config: object, *fields: str):
    """The same for each of these fields, none of which may be less."""
    for field in fields:
        require(getattr(config, field) >= bound, config, field, f"must be at least {bound}")


def require_positive(config: object, *fields: str):
    for field in fields:
        require(getattr(config, field) > 0, config, field, "must be positive")
