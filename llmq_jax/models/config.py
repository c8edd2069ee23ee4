"""Validation shared by the config dataclasses."""

from collections.abc import Collection, Mapping
from typing import Any

from llmq_jax.errors import BadInput
from llmq_jax.layers.positions import Rope, rope_from


def require(condition: bool, config: object, field: str, rule: str) -> None:
    """Raise BadInput that names the field, its value and the rule it breaks."""
    if not condition:
        raise BadInput(f"{type(config).__name__}.{field}={getattr(config, field)!r} {rule}")


LARGEST_SIZE = 2**31 - 1
"""The largest size of an array or a table; a config.json that has a larger one is damaged."""
MOST_LAYERS = 10_000


def require_at_least(bound: int, config: object, *fields: str) -> None:
    """BadInput where one of these fields is below `bound`, or above what any model has."""
    for field in fields:
        value, most = getattr(config, field), MOST_LAYERS if field == "num_hidden_layers" else LARGEST_SIZE
        require(value >= bound, config, field, f"must be at least {bound}")
        require(value <= most, config, field, f"must be at most {most:,}")


def require_sizes(fields: Mapping[str, Any]) -> None:
    """BadInput for a number of a file that is beyond all models, before anything is allocated by it."""
    for name, value in fields.items():
        if type(value) is int and abs(value) > LARGEST_SIZE:
            raise BadInput(f"{name}={value} is beyond all models; at most {LARGEST_SIZE:,} is possible")


def require_positive(config: object, *fields: str) -> None:
    for field in fields:
        require(getattr(config, field) > 0, config, field, "must be positive")


def require_rates(config: object, *fields: str) -> None:
    """BadInput where one of these fields is no rate of dropout."""
    for field in fields:
        require(0.0 <= getattr(config, field) < 1.0, config, field, "must be at least 0 and below 1")


def require_one_of(names: Collection[str], config: object, field: str) -> None:
    require(getattr(config, field) in names, config, field, f"must be one of {', '.join(names)}")


def set_rope(config: Any, field: str, head_width: int) -> None:
    """Check the field of a new config that holds a rope. A dict, as in config.json, is converted; if it has no base, it
    gets the config class's default."""
    rope = getattr(config, field)
    if not isinstance(rope, Rope):
        require(isinstance(rope, Mapping), config, field, "must be a Rope, or a dict of its fields")
        base = {"rope_theta": getattr(type(config), field).rope_theta}
        rope = base | {name: value for name, value in rope.items() if value is not None}
    object.__setattr__(config, field, rope_from(rope, head_width, config.max_position_embeddings))


LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""The kinds of layers, by transformers' names: local ones see a window of keys, global ones all."""
ROPE_FIELDS = {GLOBAL: "rope_parameters", LOCAL: "local_rope_parameters"}
"""{kind of layer: field with its RoPE}, in configs that have both."""


class KindsOfLayers:
    """What a config with `layer_types`, and `usual_layer_types` where these are None, says of each layer."""

    layer_types: tuple[str, ...] | list[str] | None
    sliding_window: Any

    @property
    def usual_layer_types(self) -> tuple[str, ...]:
        """The kind of each layer where `layer_types` is None."""
        raise NotImplementedError

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return self.usual_layer_types if self.layer_types is None else tuple(self.layer_types)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Keys that a token sees in each layer; None is all."""
        return tuple(self.sliding_window if kind == LOCAL else None for kind in self.layer_kinds)


def set_layer_types(config: Any) -> None:
    """Check `layer_types`, the kind of each layer, of a new config; None stands for `usual_layer_types`."""
    if config.layer_types is None:
        return
    given = isinstance(config.layer_types, list | tuple)
    require(given, config, "layer_types", f"must be a list: the kind of each layer, {LOCAL} or {GLOBAL}")
    kinds = tuple(config.layer_types)
    object.__setattr__(config, "layer_types", kinds)
    for kind in kinds:
        require(kind in (LOCAL, GLOBAL), config, "layer_types", f"has {kind!r}, which is neither {LOCAL} nor {GLOBAL}")
    layers = config.num_hidden_layers
    require(len(kinds) == layers, config, "layer_types", f"has {len(kinds)} kinds for num_hidden_layers={layers}")
    # The usual ones, written out, are held as None: so equal models have equal configs, and `override` of
    # num_hidden_layers lengthens or shortens them.
    if kinds == config.usual_layer_types:
        object.__setattr__(config, "layer_types", None)
