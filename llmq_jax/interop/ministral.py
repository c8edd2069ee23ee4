"""Ministral's weights and config.

- `hf`: transformers' `MinistralForCausalLM`, whose names are Llama's. Its AutoConfig takes a Mistral whose config.json
  has `layer_types` for one, and so does `config_from_hf`.
"""

from collections.abc import Mapping
from typing import Any

from llmq_jax.interop import llama3
from llmq_jax.interop.configs import GROUPED, ConfigTable
from llmq_jax.interop.rope import read_rope
from llmq_jax.models.config import LOCAL
from llmq_jax.models.ministral import MinistralConfig

LAYOUTS = {"hf": llama3.LAYOUTS["hf"]}


def read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with a window only where some layers have it."""
    values = read_rope(values)
    kinds = values.get("layer_types")
    return values | ({"sliding_window": None} if isinstance(kinds, list) and LOCAL not in kinds else {})


def write_fields(config: MinistralConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Sizes and kinds of layers written out, and a window, without which transformers' model fails even where no layer
    is local."""
    window = config.sliding_window or MinistralConfig.sliding_window
    return llama3.write_sizes(config, values | {"layer_types": list(config.layer_kinds), "sliding_window": window})


CONFIG = ConfigTable(
    config_class=MinistralConfig,
    architecture="MinistralForCausalLM",
    classifier="MinistralForSequenceClassification",
    shared=GROUPED | {"hidden_act", "layer_types", "sliding_window"},
    own=llama3.MISTRAL_OWN,
    read=read_fields,
    write=write_fields,
)
