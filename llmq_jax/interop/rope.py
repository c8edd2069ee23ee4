"""RoPE in `config.json`: several spellings, old and new, are read; one of each is written, which say the same.

- new (transformers 5): `rope_parameters` {rope_type, rope_theta, factor, ...}
- old (transformers 4): `rope_theta` beside `rope_scaling` {rope_type or type, factor, ...}, null where there is no
  scaling
- either: `original_max_position_embeddings` may stand outside
- where layers of two kinds differ (Gemma 3), new: `rope_parameters` {full_attention: {...}, sliding_attention: {...}};
  old: the old spelling above for full attention, `rope_local_base_freq` for sliding attention, which is not scaled
"""

from collections.abc import Mapping
from typing import Any

from llmq_jax.errors import BadInput, warn
from llmq_jax.interop.tables import KEEP
from llmq_jax.layers.positions import ROPES, Rope, YarnRope
from llmq_jax.models.config import GLOBAL, LOCAL

ORIGINAL = "original_max_position_embeddings"
WITHOUT_ORIGINAL = ("default", "linear", "dynamic")
"""The types for which transformers ignores ORIGINAL. For `dynamic` the original is max_position_embeddings."""
NEUTRAL = {"finetuned": (True, False), "attn_factor": (1,), "extrapolation_factor": (1,)}
"""{parameter of YaRN's own code (jquesnelle/yarn): the values with which it changes nothing}."""
UNREAD = "transformers does not read it where layers of two kinds differ"
WITHOUT_TYPE = ("rope_theta", "partial_rotary_factor", ORIGINAL)
"""Parameters that may stand without a rope_type: they scale nothing."""


def read_rope(values: Mapping[str, Any], updated: bool = False) -> dict[str, Any]:
    """A config.json with all its parameters of RoPE in one `rope_parameters`. BadInput for contradictions.

    Where it has both `rope_parameters` and `rope_scaling`, transformers reads the latter alone or, as `updated` says
    for some models, updates the former by the latter.
    """
    values = dict(values)
    spellings = {name: values.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling")}
    for name, parameters in spellings.items():
        if not isinstance(parameters, dict):
            raise BadInput(f"{name}={parameters!r} is not an object of parameters")
    outside = {name: values.pop(name, None) for name in ("rope_theta", ORIGINAL)}
    new, old = spellings.values()
    read = {"rope_type" if key == "type" else key for key, value in (outside | old).items() if value is not None}
    unread = [key for key, value in new.items() if value is not None and key not in (*read, "type")]
    if old and unread and not updated:
        raise BadInput(
            f"rope_parameters has {', '.join(unread)}, which rope_scaling lacks: transformers reads rope_scaling in "
            "its place, without; keep one of the two"
        )
    merged = _merged(spellings | {"config.json": outside})
    untyped = [key for key in merged if key not in WITHOUT_TYPE]
    if untyped and "rope_type" not in merged:
        name = next(name for name, parameters in spellings.items() if untyped[0] in parameters)
        raise BadInput(f"{name} has {', '.join(untyped)} and lacks rope_type; name one of {', '.join(ROPES)}")
    if merged.get("rope_type") == "yarn" and "attn_factor" in merged:
        given = merged.pop("attn_factor")
        if "attention_factor" not in merged:
            warn(
                f"rope_type 'yarn' has attn_factor={given!r:.60}, which counts for nothing, as in transformers; vLLM "
                "and llama.cpp scale by it: to do so, give as attention_factor its product with 0.1 ln(factor) + 1"
            )
    _warn_of_another_ratio(merged, values.get("max_position_embeddings"))
    if merged.get("rope_type", "default") in WITHOUT_ORIGINAL:
        merged.pop(ORIGINAL, None)
    return {**values, "rope_parameters": merged}


def _merged(places: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters that several places of a config.json give, without those that change nothing. BadInput where two
    places contradict each other."""
    merged: dict[str, Any] = {}
    for name, parameters in places.items():
        for key, value in parameters.items():
            key = "rope_type" if key == "type" and "rope_type" not in parameters else key
            if value is None or value in NEUTRAL.get(key, ()):
                continue
            known = merged.setdefault(key, value)
            if known is not value and known != value:  # `is`, since NaN differs from itself
                raise BadInput(f"{name} has {key}={value!r}, and {known!r} is said of it elsewhere; keep one")
    return merged


def _warn_of_another_ratio(parameters: Mapping[str, Any], longest: Any) -> None:
    """Warn, as transformers does, if YaRN's factor is not the ratio of the two lengths: the factor is what counts.

    A ratio of 1 is fine: the longest context is that of training. Other types than YaRN are not looked at: Llama 3.2
    has factor 32 and ratio 16 by intention.
    """
    factor, trained = parameters.get("factor"), parameters.get(ORIGINAL)
    given: tuple[Any, ...] = (factor, trained, longest)
    numbers = all(type(value) in (int, float) and value > 0 for value in given)
    if parameters.get("rope_type") == "yarn" and numbers and longest / trained not in (1, factor):
        warn(
            f"rope_type 'yarn' has factor={factor}, which counts, and max_position_embeddings={longest} is "
            f"{longest / trained:g} times {ORIGINAL}={trained}"
        )


def read_ropes(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `read_rope`, where layers of two kinds differ: `rope_parameters` are those of global layers,
    `local_rope_parameters` those of the others."""
    values = dict(values)
    by_kind = values.pop("rope_parameters", None) or {}
    if not isinstance(by_kind, dict):
        raise BadInput(f"rope_parameters={by_kind!r} is not an object of parameters by kind of layer")
    by_kind = dict(by_kind)
    full, sliding = (by_kind.pop(kind, None) for kind in (GLOBAL, LOCAL))
    if by_kind:
        raise BadInput(f"rope_parameters has {', '.join(by_kind)} outside of {GLOBAL} and {LOCAL}, the kinds of layers")
    local = read_rope({"rope_parameters": sliding, "rope_theta": values.pop("rope_local_base_freq", None)})
    values = read_rope({**values, "rope_parameters": full}, updated=True)
    values["local_rope_parameters"] = local["rope_parameters"]
    for name in ("rope_parameters", "local_rope_parameters"):
        if values[name].get("truncate") is False:
            raise BadInput(f"{name}: truncate=False is not supported: {UNREAD}; drop it")
    return values


def write_rope(rope: Rope, values: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A config.json with the RoPE of a config whose heads have `width` features, in both spellings."""
    exported = rope.exported(width)
    parameters = exported.to_dict()
    longest = {"max_position_embeddings": parameters.pop(ORIGINAL)} if exported.rope_type == "dynamic" else {}
    # Of this type alone transformers 4 reads the trained length outside of the parameters.
    trained = {ORIGINAL: parameters[ORIGINAL]} if exported.rope_type == "longrope" else {}
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        **values,
        **longest,
        **trained,
        "rope_parameters": parameters,
        "rope_theta": exported.rope_theta,
        "rope_scaling": None if exported.rope_type == "default" else scaling,
    }


def write_ropes(rope: Rope, local: Rope, values: Mapping[str, Any], width: int) -> dict[str, Any]:
    """As `write_rope`, where layers of two kinds differ. The old spelling has no place for a scaling of local
    layers."""
    for name, one in (("rope_parameters", rope), ("local_rope_parameters", local)):
        if isinstance(one, YarnRope) and not one.truncate:
            raise BadInput(f"{name}: truncate=False cannot be exported: {UNREAD}; {KEEP}")
    of_full, of_sliding = (write_rope(each, values, width) for each in (rope, local))
    trained = [part["max_position_embeddings"] for part in (of_full, of_sliding)]
    if trained[0] != trained[1]:
        raise BadInput(
            "local_rope_parameters cannot be exported: to transformers the trained length of rope_type 'dynamic' is "
            f"max_position_embeddings, for all layers; here one kind has {trained[0]} and the other {trained[1]}"
        )
    by_kind = {GLOBAL: of_full["rope_parameters"], LOCAL: of_sliding["rope_parameters"]}
    return {**of_full, "rope_parameters": by_kind, "rope_local_base_freq": of_sliding["rope_theta"]}
