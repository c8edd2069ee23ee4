"""One architecture a file, all on the skeleton in `decoder`; here they are found by name."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.field_types import as_type, create, float_type, has_type, type_name, whole
from llmq_jax.layers.axes import constrain_like_params
from llmq_jax.layers.positions import Rope
from llmq_jax.models import deepseek3, gemma, gpt2, llama3, mistral, mixtral, qwen
from llmq_jax.models.config import GLOBAL, LOCAL, ROPE_FIELDS, require_sizes
from llmq_jax.models.decoder import SHAPES_ALONE, Decoder
from llmq_jax.models.deepseek3 import DeepSeek3, DeepSeekV3Config
from llmq_jax.models.gemma import Gemma, Gemma2Config, Gemma3Config
from llmq_jax.models.gpt2 import GPT2, GPT2Config
from llmq_jax.models.llama3 import Llama3, Llama3Config
from llmq_jax.models.ministral import MinistralConfig
from llmq_jax.models.mistral import MistralConfig
from llmq_jax.models.mixtral import Mixtral, MixtralConfig
from llmq_jax.models.qwen import Qwen2Config, Qwen3Config, Qwen3MoeConfig

__all__ = [
    "ARCHITECTURES",
    "GPT2",
    "PRESETS",
    "Architecture",
    "DeepSeek3",
    "DeepSeekV3Config",
    "GPT2Config",
    "Gemma",
    "Gemma2Config",
    "Gemma3Config",
    "Llama3",
    "Llama3Config",
    "MinistralConfig",
    "MistralConfig",
    "Mixtral",
    "MixtralConfig",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "abstract_variables",
    "all_layer_paths",
    "architecture",
    "build",
    "config_from_fields",
    "fields_from_text",
    "init",
    "override",
    "parameter_count",
    "preset",
]


def __dir__() -> list[str]:
    return __all__


class Architecture(NamedTuple):
    config_class: type
    model_class: type[Decoder]


ARCHITECTURES = {
    "gpt2": Architecture(GPT2Config, GPT2),
    "llama": Architecture(Llama3Config, Llama3),
    "mistral": Architecture(MistralConfig, Llama3),
    "ministral": Architecture(MinistralConfig, Llama3),
    "qwen2": Architecture(Qwen2Config, Llama3),
    "qwen3": Architecture(Qwen3Config, Llama3),
    "mixtral": Architecture(MixtralConfig, Mixtral),
    "qwen3_moe": Architecture(Qwen3MoeConfig, Mixtral),
    "deepseek_v3": Architecture(DeepSeekV3Config, DeepSeek3),
    "gemma2": Architecture(Gemma2Config, Gemma),
    "gemma3_text": Architecture(Gemma3Config, Gemma),
}

PRESETS: dict[str, Any] = {
    **gpt2.PRESETS,
    **llama3.PRESETS,
    **mistral.PRESETS,
    **qwen.PRESETS,
    **mixtral.PRESETS,
    **deepseek3.PRESETS,
    **gemma.PRESETS,
}


def preset(name: str, **overrides: Any) -> Any:
    """The published config of that name, with some fields changed: `preset("gpt2-124m", num_hidden_layers=4)`.

    BadInput: there is no such preset or field, or the fields contradict each other.
    """
    if name not in PRESETS:
        raise BadInput(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    return override(PRESETS[name], **overrides)


def config_from_fields(fields: Mapping[str, Any]) -> Any:
    """The config that the dict of its fields and its `model_type` stands for, as runs and checkpoints keep it.

    BadInput: there is no such architecture, or the fields are not its own.
    """
    values = dict(fields)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise BadInput(
            f"model_type {model_type!r} is none of {', '.join(ARCHITECTURES)}; one of your own is loaded from "
            "Python, after the file that registers it is imported (docs/own_model.md)"
        )
    try:
        require_sizes(values)
        return create(ARCHITECTURES[model_type].config_class, values)
    except BadInput as error:
        raise BadInput(
            f"its config is damaged, of another version, or names what a script registers ({error}); such a script is "
            "imported first (docs/own_model.md)"
        ) from error


def override(config: Any, **changes: Any) -> Any:
    """The config with some fields changed. A dict of RoPE's parameters that has no base keeps the config's, as the
    scalings of model cards mean it.

    BadInput: there is no such field; the fields contradict each other; or a coefficient of a balance loss
    (`router_aux_loss_coef`, `balance`) is among the changes where `experts` have another balance, beside which it would
    have no effect.
    """
    ropes = changes.get(ROPE_FIELDS[GLOBAL])
    if isinstance(ropes, Mapping) and ropes.keys() == ROPE_FIELDS.keys() and not changes.get(ROPE_FIELDS[LOCAL]):
        changes |= {field: ropes[kind] for kind, field in ROPE_FIELDS.items()}
    for field, value in changes.items():
        _require_field(type(config), field)
        if isinstance(rope := getattr(config, field), Rope) and isinstance(value, Mapping):
            said = {name: parameter for name, parameter in value.items() if parameter is not None}
            changes[field] = {"rope_theta": rope.rope_theta, **said}
    changed = dataclasses.replace(config, **changes)
    usual, experts = getattr(changed, "usual_experts", None), getattr(changed, "experts", None)
    if usual is not None and experts is not None and experts.balance != usual.balance:
        for field in ("router_aux_loss_coef", "balance"):
            if changes.get(field):
                raise BadInput(
                    f"{field}={changes[field]!r} has no effect beside experts, which have a balance of their own; give "
                    "it there"
                )
    return changed


def fields_from_text(config_class: type, assignments: Sequence[str]) -> dict[str, Any]:
    """Fields of a config from words "name=value", the value as in JSON (a text may go without its quotation marks).
    BadInput: no "=", an unknown field, one that is given twice, or a value of another type."""
    hints = typing.get_type_hints(config_class)
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise BadInput(f"{assignment!r} is no assignment to a field of the config; write {name}=VALUE")
        _require_field(config_class, name)
        if name in fields:
            raise BadInput(f"{name} is given twice: {fields[name]!r} and {text}; give it once")
        try:
            fields[name] = json.loads(text)
        except ValueError:
            fields[name] = text
        if not has_type(fields[name], hints[name]):
            advice = ""
            if isinstance(fields[name], str) and has_type([], hints[name]):
                items = [item.strip(" \"'") for item in text.strip("[]").split(",")]
                advice = f"; a list is written '{name}={json.dumps(items)}'"
            raise BadInput(f"{assignment} is not of the type {type_name(hints[name])}{advice}")
        fields[name] = as_type(fields[name], hints[name])
    return fields


def _require_field(config_class: type, name: str) -> None:
    known = [field.name for field in dataclasses.fields(config_class)]
    if name not in known:
        raise BadInput(f"{config_class.__name__} has no field {name!r}; {did_you_mean(name, known, count=1)}")


def build(
    config: Any, *, dtype: Dtype | None = None, remat: str = "none", scan_layers: bool = True, attention: str = "auto"
) -> Decoder:
    """The model of a config: a Flax module. `model.apply(variables, tokens [B, T])` gives logits [B, T, V], or [B, C]
    of a classifier. It holds no parameters: those are `init(config)`. For the options see `Decoder`; an unknown `remat`
    or `attention` is BadInput when the model first runs."""
    model_class = architecture(config).model_class
    return model_class(config, dtype=float_type(dtype), remat=remat, scan_layers=scan_layers, attention=attention)


def architecture(config: Any) -> Architecture:
    """The architecture of a config. BadInput for what is no config, or one for which no model is registered."""
    require_config(config)
    if config.model_type not in ARCHITECTURES:
        raise BadInput(
            f"no model is registered for model_type {config.model_type!r}; before it is built, name one: "
            f"llmq_jax.models.ARCHITECTURES[{config.model_type!r}] = Architecture({type(config).__name__}, YourModel)"
        )
    return ARCHITECTURES[config.model_type]


def require_config(config: Any) -> None:
    """BadInput for what is no config, such as the name of one."""
    if isinstance(config, type) or not isinstance(getattr(config, "model_type", None), str):
        raise BadInput(
            f"{config!r:.60} is no config of a model: give an instance of one of its classes, as lq.GPT2Config(...); "
            "dataclasses.replace changes fields of another"
        )


def init(config: Any, seed: int = 0) -> dict[str, Any]:
    """Fresh variables in float32: a dict of collections, "params" among them. On a mesh each device makes its part."""
    model = build(config)
    seed = seed if isinstance(seed, jax.Array) else whole(seed, "seed")  # an array may be traced
    initialise = jax.jit(lambda key: constrain_like_params(model.init(key, jnp.zeros((1, 1), jnp.int32))))
    variables: dict[str, Any] = initialise(jax.random.key(seed))
    return variables


def abstract_variables(config: Any) -> dict[str, Any]:
    """The shapes and types of `init(config)`, without making any array."""
    shapes: dict[str, Any] = jax.tree.map(lambda leaf: leaf, _shapes(build(config)))  # fresh dicts for the caller
    return shapes


def parameter_count(params: Any) -> int:
    """How many values a tree of arrays, or of their shapes, holds: one or several collections of variables."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@lru_cache(maxsize=32)
def _shapes(model: Decoder) -> dict[str, Any]:
    """Cached, because readers and writers of weights ask often and each answer traces a whole pass; and by model,
    because another model may be registered for the same config."""

    def initialise() -> Any:
        key = jax.random.key(0)
        return model.init({"params": key, SHAPES_ALONE: key}, jnp.zeros((1, 1), jnp.int32))

    shapes: dict[str, Any] = jax.eval_shape(initialise)
    return shapes


def all_layer_paths(config: Any) -> tuple[tuple[tuple[str, str], int], ...]:
    """`Decoder.all_layer_paths` of the model of a config."""
    return build(config).all_layer_paths()
