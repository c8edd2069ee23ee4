"""Config tables: two-way between our config dataclasses and the `config.json` of transformers.

A field that changes the computation must have a value that we compute; one that does not is ignored; one that we do not
know is named in a warning.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmq_jax.errors import BadInput, warn
from llmq_jax.field_types import as_type, has_type, type_name
from llmq_jax.interop.float8 import without_blocks
from llmq_jax.interop.generation_config import IGNORED
from llmq_jax.interop.tables import KEEP
from llmq_jax.models.config import require_sizes
from llmq_jax.models.heads import numbered_labels

# Fields of any config.json that do not change what a decoder computes, beside those of generation, of which reading its
# config tells; at the end those of other programs.
_HARMLESS = """
    _attn_implementation _name_or_path _num_labels architectures attn_implementation bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping eos_token_id
    finetuning_task gradient_checkpointing id2label is_decoder label2id length_penalty max_length model_type
    num_beam_groups num_labels num_return_sequences output_attentions output_hidden_states output_past output_scores
    pad_token_id prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    _attn_implementation_autoset _commit_hash _flash_attn_2_enabled is_llama_config max_sequence_length
    transformers.js_config unsloth_fixed unsloth_version
"""
HARMLESS = frozenset(_HARMLESS.split()) | IGNORED.keys()

_ROTARY = """
    attention_dropout hidden_size initializer_range intermediate_size max_position_embeddings num_attention_heads
    num_hidden_layers rms_norm_eps rope_parameters tie_word_embeddings vocab_size
"""
ROTARY = frozenset(_ROTARY.split())
"""Fields that our configs of all models with rotary positions share with transformers' configs."""
GROUPED = ROTARY | {"head_dim", "num_key_value_heads"}
"""The same for models with grouped-query attention."""

ACTIVATION_FIELDS = ("activation_function", "hidden_act", "hidden_activation")
# transformers has several names for the same few functions.
ACTIVATION_SPELLINGS = {
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}

NULL_DROPOUT = {"attention_dropout": 0.0}
"""`ConfigTable.null` for configs of transformers in which attention_dropout may be null."""

# Fields of any config.json that do change what is computed, with the only values that we compute.
FIXED: dict[str, Any] = {
    "chain_hidden_post_norm": None,
    "cross_attention_hidden_size": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "logits_mup_width_multiplier": None,
    "mtp_hidden_states_first": False,
    "mtp_per_layer_config": {},
    "partial_rotary_factor": 1.0,
    "per_layer_config": {},
    "pruned_heads": {},
    "quantization_config": None,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
}


def require_whole_heads(config: Any) -> None:
    """Refuse to export a width that the configs of transformers do not take."""
    if config.hidden_size % config.num_attention_heads:
        raise BadInput(
            f"hidden_size={config.hidden_size} cannot be exported: transformers' {config.model_type} takes multiples "
            f"of num_attention_heads={config.num_attention_heads} only, whatever head_dim says; {KEEP}"
        )


CLASSIFIER = "ForSequenceClassification"
"""The suffix of the class names of transformers' classifiers."""
ONE_CLASS_A_TEXT = (None, "single_label_classification", "regression")
CLASSIFIER_FIELDS = ("architectures", "id2label", "label2id", "num_labels", "problem_type")
"""The fields of config.json that describe a classifier."""


def read_labels(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes of a config.json's classifier; None where the model is not one. BadInput: a text may
    have several classes or several numbers, or the names are not as transformers writes them."""
    architectures = values.get("architectures") or []
    if not has_type(architectures, list[str]):
        raise BadInput(f"architectures={architectures!r} is no list of names")
    if not any(name.endswith(CLASSIFIER) for name in architectures):
        return None
    problem = values.get("problem_type")
    if problem not in ONE_CLASS_A_TEXT:
        raise BadInput(f"problem_type={problem!r} is not supported: a text has one of the classes, not several")
    labels = _named_labels(values)
    if problem == "regression" and len(labels) > 1:
        raise BadInput(
            f"problem_type='regression' with {len(labels)} labels is not supported: they are numbers, not classes; a "
            "model of one label gives a number"
        )
    return labels


def _named_labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    named = values.get("id2label")
    if named is None:  # transformers' default
        count = values.get("num_labels") or 2
        if type(count) is not int or count < 1:
            raise BadInput(f"num_labels={count!r} is no number of classes")
        return numbered_labels(count)
    by_number = {str(number): label for number, label in named.items()} if isinstance(named, Mapping) else {}
    if not by_number or set(by_number) != {str(i) for i in range(len(by_number))}:
        raise BadInput(f"id2label={named!r} does not number the classes 0, 1, ...")
    if not all(isinstance(label, str) for label in by_number.values()):
        raise BadInput(f"id2label={named!r} has names that are no strings")
    return tuple(by_number[str(i)] for i in range(len(by_number)))


def write_labels(labels: Sequence[str] | None) -> dict[str, Any]:
    """The fields of config.json for these classes."""
    if labels is None:
        return {}
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


@dataclass(frozen=True)
class ConfigTable:
    """The config of one architecture, on both sides."""

    config_class: type
    architecture: str
    """transformers' class, written as "architectures"."""
    classifier: str
    """The same for a model with labels."""
    shared: frozenset[str]
    """Our fields that transformers' config has by the same name. A field that is neither here nor in `names`, `own` and
    `training` is one that a user added, which transformers would ignore."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{our field: its names in config.json} where it has another than ours, or several (transformers' `attribute_map`).
    All are read, and ours; the first is written."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """{their field: the only value that we compute}; written on export."""
    ignored: frozenset[str] = frozenset()
    """Fields of this architecture that do not change what we compute."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """{our field that transformers does not compute: the value that it computes with}."""
    remedies: Mapping[str, str] = field(default_factory=dict)
    """{such a field: what to do with another value}, where that is not to keep the model in our own format."""
    training: frozenset[str] = frozenset()
    """Our fields that training alone reads; config.json has no place for them, and they are not exported."""
    null: Mapping[str, Any] = field(default_factory=dict)
    """{their field: the value that transformers computes with where it is null}, for fields whose type here has no
    None. It may differ from the default of an absent field: a null switch is off."""
    essence: Callable[[Any], Any] = lambda config: config
    """From our config, the one of the same function without what only training or speed depends on, if it can be left
    out."""
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Brings all spellings of a config.json to one, before its fields are read."""
    write: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda config, values: values
    """From (our config, a config.json with our fields' values), the config.json that is written."""

    def from_hf(self, values: Mapping[str, Any]) -> Any:
        """Our config; fields that are absent take our defaults, which are transformers' defaults."""
        labels = read_labels(values)
        values = without_blocks(values)
        values = self._by_written_names(values)
        values = self.read({name: self.null.get(name) if value is None else value for name, value in values.items()})
        for name, supported in (FIXED | dict(self.fixed)).items():
            value = values.get(name, supported)
            absent = value is None and (name in FIXED or not supported)
            if value != supported and not absent:
                raise BadInput(f"{name}={value!r} is not supported, only {supported!r}")
        fields = {}
        for name, hint in typing.get_type_hints(self.config_class).items():
            key = self._written_name(name)
            if typing.get_origin(hint) is typing.ClassVar or name in self._elsewhere or key not in values:
                continue
            if not has_type(values[key], hint):
                raise BadInput(f"{key}={values[key]!r} is not of the type {type_name(hint)}")
            value = as_type(values[key], hint)
            fields[name] = ACTIVATION_SPELLINGS.get(value, value) if name in ACTIVATION_FIELDS else value
        known = {*HARMLESS, *FIXED, *self.fixed, *self.ignored, *map(self._written_name, fields)}
        unknown = sorted(set(values) - known)
        if unknown:
            warn(f"config.json: unknown fields are ignored: {', '.join(unknown)}")
        require_sizes(fields)
        return self.config_class(**fields, labels=labels)

    def to_hf(self, config: Any) -> dict[str, Any]:
        """`config.json` as a dict, without the fields that belong to weights (`dtype`) and special tokens.

        A field that transformers does not have is left out if it has its default, with which the model must compute
        what transformers' model does; any other value is BadInput.
        """
        config = self.essence(config)
        for name, theirs in self.own.items():
            value = getattr(config, name)
            if value != theirs:
                known = f"transformers' {config.model_type} does not compute it"
                raise BadInput(f"{name}={value!r} cannot be exported: {known}; {self.remedies.get(name, KEEP)}")
        fields = {}
        for entry in dataclasses.fields(config):
            name, value = entry.name, getattr(config, entry.name)
            if name in self.names or name in self.shared:
                fields[self._written_name(name)] = value
            elif name not in self._elsewhere and value != _default(entry):
                unknown = f"transformers' {config.model_type} has no such field"
                raise BadInput(f"{name}={value!r} cannot be exported: {unknown}; {KEEP}")
        values = {
            "architectures": [self.architecture if config.labels is None else self.classifier],
            **write_labels(config.labels),
            "model_type": config.model_type,
            "use_cache": True,
            **self.fixed,
            **fields,
        }
        return self.write(config, values)

    def _written_name(self, field: str) -> str:
        """The name by which config.json is written with one of our fields."""
        return self.names.get(field, (field,))[0]

    def _by_written_names(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config.json, each by the name by which it is written. BadInput for one that has two names
        there and two values."""
        written = {name: names[0] for ours, names in self.names.items() for name in (*names, ours)}
        spelt: dict[str, str] = {}
        for name, value in sorted(values.items(), key=lambda entry: entry[1] is None):  # null yields to another name
            first = spelt.setdefault(written.get(name, name), name)
            if first != name and value not in (None, values[first]):
                raise BadInput(f"{first}={values[first]!r} and {name}={value!r} are one field; keep one of them")
        return {name: values[found] for name, found in spelt.items()}

    @property
    def _elsewhere(self) -> set[str]:
        """Our fields that are not fields of config.json."""
        return {*self.own, *self.training, "labels"}


def _default(entry: dataclasses.Field[Any]) -> Any:
    """A field's default value; MISSING, which equals no value, where it has none."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
