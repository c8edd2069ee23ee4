"""Gemma's weights and configs, and the text part of the multimodal Gemma 3.

- `hf`: transformers' `Gemma3ForCausalLM` and `Gemma2ForCausalLM`. Linear layers are torch's, stored (out, in); norms
  hold w of 1 + w, as ours do. A tied head is not in the file. Files of the models without a head leave out the prefix
  `model.`.
- `gguf`: the names of llama.cpp, where norms hold 1 + w.

The multimodal model (`model_type` "gemma3") is a vision tower and a projector beside a `gemma3_text`, whose tensors are
`language_model.model...` in most files, and `model.language_model...` in some and in transformers' memory. The text
model alone is read, and exported as such; what is left out is named in one warning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.interop import llama3
from llmq_jax.interop.configs import CLASSIFIER_FIELDS, GROUPED, NULL_DROPOUT, ConfigTable, require_whole_heads
from llmq_jax.interop.generation_config import TOKEN_IDS
from llmq_jax.interop.qwen import with_norms
from llmq_jax.interop.rope import read_rope, read_ropes, write_rope, write_ropes
from llmq_jax.interop.tables import Shape, Transform, WeightTable, rule, vector
from llmq_jax.models.config import GLOBAL, LOCAL, MOST_LAYERS
from llmq_jax.models.gemma import Gemma2Config, Gemma3Config

LAYER = "model.layers.{layer}"
# In place of Llama's post_attention_layernorm, which is the norm before the feed-forward network.
NORMS = (
    rule(f"{LAYER}.post_attention_layernorm.weight", "{block}/post_attention_norm/scale", vector),
    rule(f"{LAYER}.pre_feedforward_layernorm.weight", "{block}/mlp_norm/scale", vector),
    rule(f"{LAYER}.post_feedforward_layernorm.weight", "{block}/post_mlp_norm/scale", vector),
)
GEMMA2 = llama3.LAYOUTS["hf"].with_rules("{block}/mlp_norm/scale", *NORMS)
GEMMA3 = replace(
    with_norms(GEMMA2, f"{LAYER}.self_attn.q_norm", f"{LAYER}.self_attn.k_norm"),
    within={"language_model.": "", "model.language_model.": "model."},
    beside=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)


@dataclass(frozen=True)
class OneMore(Transform):
    """Theirs is ours and 1."""

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        return super().to_ours(theirs - 1, shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return super().to_theirs(ours + 1)


def with_one_more(table: WeightTable) -> WeightTable:
    """The table with norms that hold 1 + w."""
    one_more = OneMore(vector.merge)
    changed = (
        entry._replace(transform=one_more) if entry.path.endswith("norm/scale") else entry for entry in table.rules
    )
    return replace(table, rules=tuple(changed))


GGUF_NORMS = (
    rule("blk.{layer}.post_attention_norm.weight", "{block}/post_attention_norm/scale", vector),
    rule("blk.{layer}.ffn_norm.weight", "{block}/mlp_norm/scale", vector),
    rule("blk.{layer}.post_ffw_norm.weight", "{block}/post_mlp_norm/scale", vector),
)
GGUF = llama3.in_halves(llama3.LAYOUTS["gguf"]).with_rules("{block}/mlp_norm/scale", *GGUF_NORMS)
GEMMA2_LAYOUTS = {"hf": GEMMA2, "gguf": with_one_more(GGUF)}
GEMMA3_LAYOUTS = {
    "hf": GEMMA3,
    "gguf": with_one_more(with_norms(GGUF, "blk.{layer}.attn_q_norm", "blk.{layer}.attn_k_norm")),
}


def read_gemma2(values: Mapping[str, Any]) -> dict[str, Any]:
    return within_context(read_rope(values), Gemma2Config)


def within_context(values: dict[str, Any], config_class: type[Gemma2Config]) -> dict[str, Any]:
    """The values with the window cut to the longest sequence, beyond which it masks nothing, and without a window that
    is null where no layer has one."""
    kinds = values.get("layer_types")
    if values.get("sliding_window", 0) is None and isinstance(kinds, list) and LOCAL not in kinds:
        values = {name: value for name, value in values.items() if name != "sliding_window"}
    window = values.get("sliding_window", config_class.sliding_window)
    longest = values.get("max_position_embeddings", config_class.max_position_embeddings)
    shorter = type(window) is type(longest) is int and window > longest
    return values | {"sliding_window": longest} if shorter else values


def read_gemma3(values: Mapping[str, Any]) -> dict[str, Any]:
    """All spellings as one: older files give the distance of global layers in place of layer_types."""
    values = within_context(read_ropes(values), Gemma3Config)
    every = values.pop("sliding_window_pattern", None)
    layers = values.get("num_hidden_layers", Gemma3Config.num_hidden_layers)
    listed = type(layers) is int and layers <= MOST_LAYERS  # more are refused as they are
    if values.get("layer_types") is None and every is not None and listed:
        if type(every) is not int or every < 1:
            raise BadInput(f"sliding_window_pattern={every!r} is not the distance of two global layers, at least 1")
        values["layer_types"] = [GLOBAL if (layer + 1) % every == 0 else LOCAL for layer in range(layers)]
    return values


def read_multimodal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a multimodal Gemma 3 as that of its text part."""
    text = values.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise BadInput(f"text_config={text!r} is not an object of fields")
    # The head is part of the text model, but the whole model's config says which classes it has and whether it is tied,
    # and how weights are stored.
    head = {name: values.get(name) for name in (*CLASSIFIER_FIELDS, "quantization_config")}
    special = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    return {**text, **head, **special, "tie_word_embeddings": values.get("tie_word_embeddings", True)}


def write_gemma2(config: Gemma2Config, values: dict[str, Any]) -> dict[str, Any]:
    """The config.json with the kinds of layers written out, as transformers writes them."""
    require_whole_heads(config)
    return write_rope(config.rope, values | {"layer_types": list(config.layer_kinds)}, config.head_dim)


def write_gemma3(config: Gemma3Config, values: dict[str, Any]) -> dict[str, Any]:
    """The same, with RoPE by the kind of layer."""
    require_whole_heads(config)
    values = values | {"layer_types": list(config.layer_kinds)}
    del values["local_rope_parameters"]
    return write_ropes(config.rope, config.local_rope, values, config.head_dim)


_SHARED = """
    attention_bias final_logit_softcapping hidden_activation layer_types query_pre_attn_scalar sliding_window
"""
SHARED = GROUPED | set(_SHARED.split())
OWN = {"norm": "zero_centred_rms_norm", "experts": None}
# The activation is hidden_activation's, whatever hidden_act says; caches are ours.
IGNORED = frozenset({"cache_implementation", "hidden_act", "sliding_window_size"})

GEMMA2_CONFIG = ConfigTable(
    config_class=Gemma2Config,
    architecture="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    shared=SHARED | {"attn_logit_softcapping"},
    fixed={"use_bidirectional_attention": False},
    own=OWN,
    ignored=IGNORED,
    null=NULL_DROPOUT,
    read=read_gemma2,
    write=write_gemma2,
)
GEMMA3_CONFIG = ConfigTable(
    config_class=Gemma3Config,
    architecture="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    shared=SHARED | {"local_rope_parameters"},  # `write_gemma3` puts it into rope_parameters
    # transformers has the field, and nothing reads it: it computes as if it were null.
    fixed={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    own=OWN | {"attn_logit_softcapping": None},
    ignored=IGNORED | {"_sliding_window_pattern"},
    null=NULL_DROPOUT,
    read=read_gemma3,
    write=write_gemma3,
)
UNDERIVABLE = ("num_attention_heads", "sliding_window", "query_pre_attn_scalar")


def derive(shapes: Mapping[str, Shape], layers: int, layout: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields of weights that come without a config; shapes tell neither the number of heads nor windows."""
    return llama3.derive_sizes(shapes, layers, given) | {"intermediate_size": llama3.gated_width(shapes)}
