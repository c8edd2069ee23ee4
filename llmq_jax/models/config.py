"""Validation shared by the config dataclasses."""

from llmq_jax.errors import BadInput


def require(condition: bool, config: object, field: str, rule: str):
    """Raise BadInput that names the field, its value and the rule it breaks."""
    if not condition:
        raise BadInput(f"{type(config).__name__}.{field}={getattr(config, field)!r} {rule}")
