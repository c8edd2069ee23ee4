"""RoPE in `config.json`: several spellings, old and new, read; transformers' newest written.

- new (transformers 5): `rope_parameters` {rope_type, rope_theta, factor, ...}
- old: `rope_theta` beside `rope_scaling` {rope_type or type, factor, ...}, null where there is no scaling
- either: `original_max_position_embeddings` may stand outside
"""

from collections.abc import Mapping
from typing import Any

from llmq_jax.errors import BadInput
from llmq_jax.layers.positions import Rope

ORIGINAL = "original_max_position_embeddings"
WITHOUT_ORIGINAL = ("default", "linear", "dynamic")
"""The types for which transformers passes it over. Of `dynamic` it takes max_position_embeddings to be the original."""


def read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with all that it says of RoPE as one `rope_parameters`."""
    values = dict(values)
    spellings = {name: values.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling")}
    for name, parameters in spellings.items():
        if not isinstance(parameters, dict):
            raise BadInput(f"{name}={parameters!r} is not an object of parameters")
    outside = {name: values.pop(name, None) for name in ("rope_theta", ORIGINAL)}
    merged: dict[str, Any] = {}
    for name, parameters in (spellings | {"config.json": outside}).items():
        for key, value in parameters.items():
            key = "rope_type" if key == "type" and "rope_type" not in parameters else key
            if value is not None and merged.setdefault(key, value) != value:
                raise BadInput(f"{name} has {key}={value!r}, and {merged[key]!r} is said of it elsewhere; keep one")
    if merged.get("rope_type", "default") in WITHOUT_ORIGINAL:
        merged.pop(ORIGINAL, None)
    return {**values, "rope_parameters": merged}


def write_rope(rope: Rope, values: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A config.json with the rope of a config whose heads have `width` features."""
    exported = rope.exported(width)
    values = {**values, "rope_parameters": exported.to_dict()}
    if exported.rope_type == "dynamic":
        values["max_position_embeddings"] = values["rope_parameters"].pop(ORIGINAL)
    return values
