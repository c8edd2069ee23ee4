"""The weights and configs of Qwen 2 and 3.

- `hf`: transformers' `Qwen2ForCausalLM`, whose names are Llama's, and `Qwen3ForCausalLM`, which has two more: the norms
  of queries and keys.
- `gguf`: the names of llama.cpp, likewise; of Qwen it keeps the order of queries and keys.

Older files say which layers have a window by `use_sliding_window`, `sliding_window` and `max_window_layers`, from which
layer on; newer ones by `layer_types` as well. Both are read and both written.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmq_jax.errors import BadInput
from llmq_jax.interop import llama3
from llmq_jax.interop.configs import ACTIVATION_SPELLINGS, GROUPED, KEEP, ConfigTable
from llmq_jax.interop.rope import read_rope
from llmq_jax.interop.tables import WeightTable, rule, vector
from llmq_jax.models.config import GLOBAL, LOCAL, MOST_LAYERS
from llmq_jax.models.qwen import Qwen2Config, Qwen3Config


def with_norms(table: WeightTable, query: str, key: str) -> WeightTable:
    """Llama's table with the norms of queries and keys, by these names, before attention's output."""
    norms = (
        rule(f"{query}.weight", "{block}/attention/query_norm/scale", vector),
        rule(f"{key}.weight", "{block}/attention/key_norm/scale", vector),
    )
    out = next(i for i, entry in enumerate(table.rules) if entry.path.endswith("attention/out/kernel"))
    return replace(table, rules=(*table.rules[:out], *norms, *table.rules[out:]))


QWEN2_LAYOUTS = {"hf": llama3.LAYOUTS["hf"], "gguf": llama3.in_halves(llama3.LAYOUTS["gguf"])}
QWEN3_LAYOUTS = {
    "hf": with_norms(
        QWEN2_LAYOUTS["hf"], "model.layers.{layer}.self_attn.q_norm", "model.layers.{layer}.self_attn.k_norm"
    ),
    "gguf": with_norms(QWEN2_LAYOUTS["gguf"], "blk.{layer}.attn_q_norm", "blk.{layer}.attn_k_norm"),
}

# What transformers takes where config.json does not say.
WINDOWS: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def read_qwen(values: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling: `sliding_window` where some layers have one, and `layer_types`."""
    values = read_rope(values)
    used, window, first = (values.pop(name, default) for name, default in WINDOWS.items())
    for name, value, kind in (("use_sliding_window", used, bool), ("max_window_layers", first, int)):
        if type(value) is not kind:
            raise BadInput(f"{name}={value!r} is not of the type {kind.__name__}")
    if not used or window is None:
        return values
    layers = values.get("num_hidden_layers", Qwen2Config.num_hidden_layers)
    if values.get("layer_types") is None and type(layers) is int:
        # A config with more than the most is refused, whatever their kinds.
        layers = min(layers, MOST_LAYERS)
        values["layer_types"] = [LOCAL if layer >= first else GLOBAL for layer in range(layers)]
    kinds = values.get("layer_types")
    if not isinstance(kinds, list) or LOCAL in kinds:
        values["sliding_window"] = window
    return values


def write_qwen3(config: Qwen2Config, values: dict[str, Any]) -> dict[str, Any]:
    """Sizes and kinds of layers written out, and kinds in the older spelling too."""
    kinds = list(config.layer_kinds)
    windows = {
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": kinds.index(LOCAL) if LOCAL in kinds else len(kinds),
        "layer_types": kinds,
    }
    return llama3.write_sizes(config, values | windows)


def write_qwen2(config: Qwen2Config, values: dict[str, Any]) -> dict[str, Any]:
    """The same. The width of heads, which transformers' model reads and its config does not name, is written where it
    is not hidden_size / num_attention_heads."""
    values = write_qwen3(config, values)
    return {name: value for name, value in values.items() if name != "head_dim" or config.head_dim is not None}


SHARED = GROUPED | {"hidden_act", "layer_types", "sliding_window"}
OWN = llama3.OWN | {"mlp_bias": (False, KEEP)}
# A field of Qwen's multimodal models that stands in the files of others, and that nothing reads.
IGNORED = frozenset({"use_mrope"})

QWEN2_CONFIG = ConfigTable(
    config_class=Qwen2Config,
    architecture="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    shared=SHARED,
    aliases={"hidden_act": ACTIVATION_SPELLINGS},
    own=OWN | {"attention_bias": (True, KEEP), "attention_output_bias": (False, KEEP)},
    ignored=IGNORED,
    read=read_qwen,
    write=write_qwen2,
)
QWEN3_CONFIG = ConfigTable(
    config_class=Qwen3Config,
    architecture="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    shared=SHARED | {"attention_bias"},
    aliases={"hidden_act": ACTIVATION_SPELLINGS},
    own=OWN,
    ignored=IGNORED,
    read=read_qwen,
    write=write_qwen3,
)
