"""Which architecture has which tables, and the functions that apply them."""

import contextlib
import typing
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from llmq_jax.errors import BadInput, warn
from llmq_jax.field_types import has_type, refuse_consumed, scalar, type_name
from llmq_jax.interop import deepseek3, gemma, gpt2, llama3, ministral, mixtral, qwen
from llmq_jax.interop.configs import ConfigTable
from llmq_jax.interop.tables import SCORE, WeightTable
from llmq_jax.models import ARCHITECTURES, override, require_config
from llmq_jax.models.heads import numbered_labels


class Tables(NamedTuple):
    layouts: Mapping[str, WeightTable]
    config: ConfigTable
    derive: Callable[..., dict[str, Any]]
    """Fields of a config from (shapes, layers, layout, given fields); the first two as `WeightTable.survey` tells."""
    underivable: tuple[str, ...] = ("num_attention_heads",)
    """Fields that shapes do not tell."""
    unkept: Callable[[Mapping[str, Any], Any], dict[str, Any]] = lambda state, config: {}
    """From (a state, the config stored with it): new values for the fields that announce what transformers does not
    save, where the state does not hold it."""


# Weights without a config are taken for the first architecture that has most of their names. Hence the order: Llama
# before those with the same names, Qwen 3 before Gemma 3, which has all of its names, and Mixtral before Qwen 3 with
# experts.
TABLES = {
    "gpt2": Tables(gpt2.LAYOUTS, gpt2.CONFIG, gpt2.derive),
    "llama": Tables(llama3.LAYOUTS, llama3.CONFIG, llama3.derive),
    "mistral": Tables(llama3.MISTRAL_LAYOUTS, llama3.MISTRAL_CONFIG, llama3.derive),
    "ministral": Tables(ministral.LAYOUTS, ministral.CONFIG, llama3.derive, ("num_attention_heads", "sliding_window")),
    "qwen2": Tables(qwen.QWEN2_LAYOUTS, qwen.QWEN2_CONFIG, llama3.derive),
    "qwen3": Tables(qwen.QWEN3_LAYOUTS, qwen.QWEN3_CONFIG, llama3.derive),
    "mixtral": Tables(mixtral.LAYOUTS, mixtral.CONFIG, mixtral.derive, mixtral.UNDERIVABLE),
    "qwen3_moe": Tables(
        qwen.QWEN3_MOE_LAYOUTS,
        qwen.QWEN3_MOE_CONFIG,
        qwen.derive_experts,
        (*mixtral.UNDERIVABLE, "norm_topk_prob"),
    ),
    "deepseek_v3": Tables(
        deepseek3.LAYOUTS, deepseek3.CONFIG, deepseek3.derive, deepseek3.UNDERIVABLE, deepseek3.unkept
    ),
    "gemma2": Tables(gemma.GEMMA2_LAYOUTS, gemma.GEMMA2_CONFIG, gemma.derive, gemma.UNDERIVABLE),
    "gemma3_text": Tables(gemma.GEMMA3_LAYOUTS, gemma.GEMMA3_CONFIG, gemma.derive, gemma.UNDERIVABLE),
}


class Part(NamedTuple):
    """The part of a larger, multimodal model that is implemented here."""

    model_type: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """From the larger model's config.json, that of the part."""
    prefix: str
    """What the larger model's modules have in memory where those of the part alone have `model.`."""


PARTS = {"gemma3": Part("gemma3_text", gemma.read_multimodal, "model.language_model.")}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
)
"""Fields that shapes tell whatever the others are."""
ASSUMED = ("rope_parameters", "rms_norm_eps")
"""Fields in which models of one architecture differ, and which shapes do not tell."""
SUPPORTED = ", ".join([*TABLES, *PARTS])


def from_state_dict(state: Mapping[str, Any], config: Any, layout: str = "hf", dtype: Any = None) -> dict[str, Any]:
    """The variables of a model whose PyTorch counterpart has this state dict.

    `state` maps names to numpy arrays, or to anything with a shape that numpy can read (torch tensors, the lazy tensors
    of our readers); it is read tensor by tensor. Types are kept unless `dtype` is given. Whatever is missing, unread,
    of another shape or not tied where it should be is named in one BadInput.
    """
    require_config(config)
    table = weight_table(config.model_type, layout).spelling(state)
    try:
        return table.from_state_dict(state, config, dtype)
    except BadInput as error:
        fitting = _fitting(state, config.model_type)
        _check_layout(fitting, len(state), layout)
        advice = (
            _advice_on_layout(fitting, state, config, layout)
            or _advice_on_head(state, config)
            or _advice_on_sizes(state, config, layout)
        )
        if advice is None:
            raise
        raise BadInput(f"{advice}; {error}") from error  # which may name hundreds of tensors


def to_state_dict(variables: dict[str, Any], config: Any, layout: str = "hf") -> dict[str, np.ndarray]:
    """{PyTorch name: numpy array}, the way back; also for gradients or any other tree with the structure of the
    variables, or of `variables["params"]`, whose tensors then come alone.

    A tied head has a name of its own only where the layout's files give it one (`book` and `original` do). Types are
    kept. Gemma's norms are 1 + w in `gguf`, and the 1 is added to whatever stands there: write gradients as `hf`.
    BadInput: a layout that the architecture does not have.
    """
    if not isinstance(variables, Mapping):
        raise BadInput(f"{variables!r:.60} is no dict of variables; those of a LanguageModel are lm.variables")
    refuse_consumed(variables)
    require_config(config)
    lazy = weight_table(config.model_type, layout).lazy_state_dict(variables, config)
    return {name: np.array(tensor) for name, tensor in lazy.items()}


def config_from_hf(values: Mapping[str, Any]) -> Any:
    """The config of a `config.json`, which `values` are. BadInput: an architecture that is not supported, a field that
    changes the computation and is not, or a value of the wrong type."""
    if not isinstance(values, Mapping):
        raise BadInput(f"{values!r:.60} is no dict; give what json.load reads from a config.json")
    if "model_type" not in values:
        raise BadInput(f"no model_type is given; supported: {SUPPORTED}")
    if not isinstance(values["model_type"], str):
        raise BadInput(f"model_type={values['model_type']!r} is no name; supported: {SUPPORTED}")
    values = language_part(values)
    # As in transformers' AutoConfig.
    is_ministral = values["model_type"] == "mistral" and "layer_types" in values
    return config_table("ministral" if is_ministral else values["model_type"]).from_hf(values)


def language_part(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a larger model's config.json that is about the model that we have; any other config.json
    unchanged."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in PARTS:
        return values
    part = PARTS[model_type]
    return {**part.read(values), "model_type": part.model_type}


def config_to_hf(config: Any) -> dict[str, Any]:
    """The `config.json` of a config, as a dict. BadInput for what transformers has no form for, such as other norms, or
    a field of your own that is not at its default."""
    require_config(config)
    return config_table(config.model_type).to_hf(config)


def config_from_state_dict(state: Mapping[str, Any], layout: str = "hf", **fields: Any) -> Any:
    """The config of weights that come without one, from their names and shapes.

    `fields` are those that shapes do not tell, which are required (`num_attention_heads`), and any that are to
    differ from what is derived: the architecture and the layout decide the activation function, and the head counts as
    tied when it equals the embedding. Whatever else weights do not depend on (dropout) has the config's default, and
    of Hugging Face's models so have those `ASSUMED`, with a warning.
    BadInput: fields that shapes do not tell and that are not given, or names of no architecture in this layout.
    """
    return _derived_config(_recognise(state, layout), state, layout, fields)


def _derived_config(model_type: str, state: Mapping[str, Any], layout: str, fields: dict[str, Any]) -> Any:
    """`config_from_state_dict` for weights of a known architecture."""
    tables, table = TABLES[model_type], weight_table(model_type, layout).spelling(state)
    missing = [name for name in tables.underivable if name not in fields]
    if missing:
        raise BadInput(f"the shapes of weights do not tell {' and '.join(missing)}; give it in the config")
    hints = typing.get_type_hints(tables.config.config_class)
    for name in tables.underivable:  # by which the others are derived
        if not has_type(scalar(fields[name]), hints[name]):
            raise BadInput(f"{name}={fields[name]!r} is not of the type {type_name(hints[name])}")
    shapes, layers = table.survey(state)
    try:
        derived = tables.derive(shapes, layers, layout, fields) | {"tie_word_embeddings": table.is_tied(state)}
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise BadInput(f"the weights are not those of {model_type} in the layout {layout!r}: no config fits") from error
    if (head := "score/kernel") in shapes:
        derived["labels"] = numbered_labels(shapes[head][0])
    config = override(tables.config.config_class(), **derived | fields)
    if layout == "hf" and (assumed := [name for name in ASSUMED if hasattr(config, name) and name not in fields]):
        values = {name: getattr(config, name) for name in assumed}
        shown = [f"{getattr(value, 'rope_theta', value):g} of {name}" for name, value in values.items()]
        warn(
            f"the shapes of weights do not tell {' and '.join(assumed)}, in which models differ: taken is "
            f"{' and '.join(shown)}; put the model's config.json beside the weights, or pass config={{...}} (to "
            "convert.from_hf, --config FIELD=VALUE)"
        )
    return config


def config_class_of(state: Mapping[str, Any], layout: str) -> type:
    """The class of the config of weights that come without one, from their names."""
    return TABLES[_recognise(state, layout)].config.config_class


def resolve_config(given: Any, stored: Any, state: Mapping[str, Any], layout: str) -> Any:
    """The config of weights, from the one given (None, a config, or a dict of some fields) and the one stored (or
    None).

    A config takes the place of the stored one. A dict changes fields of the stored one or, where there is none, adds
    what shapes do not tell. Modules that the stored one announces, but that transformers does not save and the state
    does not hold, are left out with a warning, unless the dict asks for them.
    """
    if is_whole(given):
        return given
    fields = dict(given or {})
    if stored is not None:
        for name, value in _tables(stored.model_type).unkept(state, stored).items():
            if name not in fields:
                announced = f"{name}={getattr(stored, name)} announces what the weights hold nothing of"
                warn(f"{announced}: transformers does not save it; loaded with {name}={value}")
                fields[name] = value
        return override(stored, **fields)
    model_type = _recognise(state, layout)
    missing = [name for name in TABLES[model_type].underivable if name not in fields]
    if missing:
        entries, words = ", ".join(f"{name!r}: ..." for name in missing), " ".join(f"{name}=..." for name in missing)
        file = "hparams.json" if layout == "openai" else "config.json"
        raise BadInput(
            f"has weights but no config, and their shapes do not tell {' and '.join(missing)}; put the model's "
            f"{file} beside them, or pass config={{{entries}}} in Python or, to convert.from_hf, --config {words}"
        )
    return _derived_config(model_type, state, layout, fields)


def is_whole(given: Any) -> bool:
    """Whether what is given as a config is one, and not None or some fields of one."""
    return given is not None and not isinstance(given, Mapping)


def weight_table(model_type: str, layout: str = "hf") -> WeightTable:
    layouts = _tables(model_type).layouts
    if layout not in layouts:
        raise BadInput(f"{model_type} has no layout {layout!r}; it has {', '.join(layouts)}")
    return layouts[layout]


def config_table(model_type: str) -> ConfigTable:
    return _tables(model_type).config


def _tables(model_type: str) -> Tables:
    if model_type not in TABLES and model_type in ARCHITECTURES:
        raise BadInput(
            f"transformers has no model of the type {model_type!r}, which is one of yours; lq.save keeps it in our own "
            "format"
        )
    if model_type not in TABLES:
        raise BadInput(f"model_type {model_type!r} is not supported; supported: {SUPPORTED}")
    return TABLES[model_type]


def _recognise(state: Mapping[str, Any], layout: str) -> str:
    """The architecture that has most of these names in this layout. BadInput: another layout has more of them, or there
    are names, and none of them is known."""
    known = dict.fromkeys(name for tables in TABLES.values() for name in tables.layouts)
    if layout not in known:
        raise BadInput(f"no architecture has the layout {layout!r}; there are {', '.join(known)}")
    fitting = {model_type: _fitting(state, model_type) for model_type in TABLES}
    model_type = max(fitting, key=lambda name: fitting[name].get(layout, 0))
    if not fitting[model_type].get(layout):  # the architecture may be one of another layout
        model_type = max(fitting, key=lambda name: max(fitting[name].values()))
        if state and not any(fitting[model_type].values()):
            shown = f"{', '.join(islice(state, 3))}{' ...' if len(state) > 3 else ''}"
            raise BadInput(f"none of the {len(state)} names is that of an architecture here: {shown}")
    _check_layout(fitting[model_type], len(state), layout)
    return model_type


def _fitting(state: Mapping[str, Any], model_type: str) -> dict[str, int]:
    """{layout: how many of the state's names it has}."""
    return {name: sum(map(table.recognises, state)) for name, table in _tables(model_type).layouts.items()}


def _check_layout(fitting: Mapping[str, int], count: int, layout: str) -> None:
    """Refuse a layout where another one has more of the `count` names."""
    fitting = {layout: 0, **fitting}
    closest = max(fitting, key=fitting.__getitem__)
    if fitting[closest] > fitting[layout]:
        raise BadInput(
            f"{fitting[layout]} of {count} names are those of layout={layout!r}, and {fitting[closest]} those of "
            f"layout={closest!r}; pass that (--layout {closest})"
        )


def _advice_on_layout(fitting: Mapping[str, int], state: Mapping[str, Any], config: Any, layout: str) -> str | None:
    """The layout whose names are the same, and whose shapes are those of the weights."""
    for other in fitting:  # in their order, so that the same one is named each time
        if other != layout and fitting[other] == fitting[layout]:
            with contextlib.suppress(BadInput):
                weight_table(config.model_type, other).spelling(state).from_state_dict(state, config)
                return f"the shapes are those of layout={other!r}; pass that (--layout {other})"
    return None


def _advice_on_head(state: Mapping[str, Any], config: Any) -> str | None:
    """What to do with a classifier's weights for a language model, and the other way round."""
    if config.labels is None and SCORE.key in state:
        return 'these are the weights of a classifier: name its classes in the config, config={"labels": [...]}'
    if config.labels is not None and SCORE.key not in state:
        return (
            "these are the weights of a language model, which knows no labels: load it without, then give it a head by "
            "lq.with_classifier(lm, labels)"
        )
    return None


def _advice_on_sizes(state: Mapping[str, Any], config: Any, layout: str) -> str | None:
    """The sizes that a config has and the weights have not."""
    table, fields = weight_table(config.model_type, layout).spelling(state), dict(vars(config))
    try:
        shapes, layers = table.survey(state)
        derived = _tables(config.model_type).derive(shapes, layers, layout, fields)
    except (LookupError, TypeError, ValueError, ZeroDivisionError):  # weights of another architecture
        return None
    sizes = {name: (derived.get(name), fields.get(name)) for name in SIZES}
    wrong = [f"{name} is {own}, not {said}" for name, (own, said) in sizes.items() if own and said and own != said]
    return f"by the shapes of the weights {' and '.join(wrong)}" if wrong else None
