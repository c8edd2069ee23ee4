"""The weights and configs of Qwen 2 and 3.

- `hf`: transformers' `Qwen2ForCausalLM`, whose names are Llama's, and `Qwen3ForCausalLM`, which has two more: the norms
  of queries and keys. `Qwen3MoeForCausalLM` has experts besides: files hold one tensor for each matrix of each expert,
  or all experts of a layer in one, as Mixtral's do.
- `gguf`: the names of llama.cpp, likewise; unlike Llama's, Qwen's queries and keys keep the order of their features
  there. The experts are as in Mixtral's.

Older files say which layers have a window by `use_sliding_window`, `sliding_window` and `max_window_layers`, from which
layer on; newer ones by `layer_types` as well. Both are read and both written. With experts all layers have the window,
whatever these say, as in transformers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmq_jax.errors import BadInput
from llmq_jax.interop import llama3, mixtral
from llmq_jax.interop.configs import GROUPED, ConfigTable
from llmq_jax.interop.rope import read_rope
from llmq_jax.interop.tables import Shape, WeightTable, rule, vector
from llmq_jax.models.config import GLOBAL, LOCAL, MOST_LAYERS
from llmq_jax.models.qwen import Qwen2Config, Qwen3Config, Qwen3MoeConfig


def with_norms(table: WeightTable, query: str, key: str) -> WeightTable:
    """Llama's table with the norms of queries and keys, by these names, before attention's output."""
    norms = (
        rule(f"{query}.weight", "{block}/attention/query_norm/scale", vector),
        rule(f"{key}.weight", "{block}/attention/key_norm/scale", vector),
    )
    return table.with_rules("{block}/attention/out/kernel", *norms)


QWEN2_LAYOUTS = {"hf": llama3.LAYOUTS["hf"], "gguf": llama3.in_halves(llama3.LAYOUTS["gguf"])}
QWEN3_LAYOUTS = {
    "hf": with_norms(
        QWEN2_LAYOUTS["hf"], "model.layers.{layer}.self_attn.q_norm", "model.layers.{layer}.self_attn.k_norm"
    ),
    "gguf": with_norms(QWEN2_LAYOUTS["gguf"], "blk.{layer}.attn_q_norm", "blk.{layer}.attn_k_norm"),
}
APART, FUSED = (
    QWEN3_LAYOUTS["hf"].with_rules("final_norm/scale", mixtral.ROUTER, *experts)
    for experts in (mixtral.APART_EXPERTS, mixtral.FUSED_EXPERTS)
)
QWEN3_MOE_LAYOUTS = {
    "hf": replace(APART, spellings=(FUSED,)),
    "gguf": QWEN3_LAYOUTS["gguf"].with_rules("final_norm/scale", *mixtral.GGUF_EXPERTS),
}


def read_window(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with `sliding_window` only where it is used. Where config.json does not say, transformers' defaults
    count."""
    values = read_rope(values)
    used, window = values.pop("use_sliding_window", False), values.pop("sliding_window", 4096)
    if type(used) is not bool:
        raise BadInput(f"use_sliding_window={used!r} is not of the type bool")
    return values | ({"sliding_window": window} if used and window is not None else {})


def read_qwen(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with `sliding_window` only where some layers have one, and then with `layer_types`."""
    values = read_window(values)
    first = values.pop("max_window_layers", 28)
    if type(first) is not int:
        raise BadInput(f"max_window_layers={first!r} is not of the type int")
    if "sliding_window" not in values:
        return values
    layers = values.get("num_hidden_layers", Qwen2Config.num_hidden_layers)
    if values.get("layer_types") is None and type(layers) is int:
        # A config with more layers than MOST_LAYERS is refused later, whatever their kinds.
        layers = min(layers, MOST_LAYERS)
        values["layer_types"] = [LOCAL if layer >= first else GLOBAL for layer in range(layers)]
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and LOCAL not in kinds:
        del values["sliding_window"]
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
    """As `write_qwen3`, but the width of heads, which transformers' model reads though its config does not name it, is
    written only where the config sets it."""
    values = write_qwen3(config, values)
    return {name: value for name, value in values.items() if name != "head_dim" or config.head_dim is not None}


def write_qwen3_moe(config: Qwen3MoeConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Sizes and switches written out."""
    own = {
        "use_sliding_window": config.sliding_window is not None,
        "mlp_only_layers": list(config.mlp_only_layers),
    }
    return llama3.write_sizes(config, values | own)


def derive_experts(shapes: Mapping[str, Shape], layers: int, layout: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields, from the shapes of weights that come without a config; they do not tell which layers are
    dense."""
    derived = mixtral.derive(shapes, layers, layout, given)
    derived["moe_intermediate_size"] = derived.pop("intermediate_size")
    dense = "mlp/gate/kernel" in shapes
    return derived | ({"intermediate_size": llama3.gated_width(shapes)} if dense else {})


SHARED = GROUPED | {"hidden_act", "layer_types", "sliding_window"}
OWN = llama3.OWN | {"mlp_bias": False}
# A field of Qwen's multimodal models that is in the files of other models too, where nothing reads it.
IGNORED = frozenset({"use_mrope"})

QWEN2_CONFIG = ConfigTable(
    config_class=Qwen2Config,
    architecture="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    shared=SHARED,
    own=OWN | {"attention_bias": True, "attention_output_bias": False},
    ignored=IGNORED,
    read=read_qwen,
    write=write_qwen2,
)
QWEN3_CONFIG = ConfigTable(
    config_class=Qwen3Config,
    architecture="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    shared=SHARED | {"attention_bias"},
    own=OWN,
    ignored=IGNORED,
    read=read_qwen,
    write=write_qwen3,
)
QWEN3_MOE_CONFIG = ConfigTable(
    config_class=Qwen3MoeConfig,
    architecture="Qwen3MoeForCausalLM",
    classifier="Qwen3MoeForSequenceClassification",
    shared=mixtral.CONFIG.shared
    | {"attention_bias", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob"},
    # The name in files of the hub. Transformers 5 reads it too, and writes ours, which other programs do not know.
    names={"num_local_experts": ("num_experts",)},
    own=OWN,
    # Qwen3-Coder's files have the last three from another model; nothing reads them.
    ignored=mixtral.CONFIG.ignored
    | {"max_window_layers", "qkv_bias", "shared_expert_intermediate_size", "use_qk_norm"},
    null={"mlp_only_layers": []},
    essence=mixtral.with_usual_experts,
    read=read_window,
    write=write_qwen3_moe,
)
