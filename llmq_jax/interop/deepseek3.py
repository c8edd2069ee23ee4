"""DeepSeek V3's weights and config.

- `hf`: the checkpoints of DeepSeek V3 and R1 and transformers' `DeepseekV3ForCausalLM`. Linear layers are torch's,
  stored (out, in). Files hold one tensor for each matrix of each expert; others hold all experts of a layer in one, as
  transformers has them in memory (`gate_up_proj`: the gate's rows first). Both are read, one or the other throughout;
  the former is written. The modules of multi-token prediction are layers after the last, L, L + 1, ..., each with
  copies of the embedding and the head, which are not read. Files of `DeepseekV3Model`, which has no head, leave out the
  prefix `model.`.

The published files are in float8: see `interop.float8`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmq_jax.errors import BadInput, warn
from llmq_jax.interop.configs import NULL_DROPOUT, ROTARY, ConfigTable
from llmq_jax.interop.mixtral import APART_EXPERTS, FUSED_EXPERTS, ROUTER, with_usual_experts
from llmq_jax.interop.rope import read_rope, write_rope
from llmq_jax.interop.tables import SCORE, Shape, WeightTable, as_is, out_in, rule, vector
from llmq_jax.models.deepseek3 import DeepSeekV3Config

LAYER = "model.layers.{layer}"
ATTENTION = f"{LAYER}.self_attn"
# What only a module of multi-token prediction has.
MTP_NORM = "enorm.weight"


def table(*experts: Any) -> WeightTable:
    return WeightTable(
        rules=(
            rule("model.embed_tokens.weight", "token_embedding/embedding", as_is),
            rule(f"{LAYER}.{MTP_NORM}", "{block}/embedding_norm/scale", vector),
            rule(f"{LAYER}.hnorm.weight", "{block}/hidden_norm/scale", vector),
            rule(f"{LAYER}.eh_proj.weight", "{block}/projection/kernel", out_in),
            rule(f"{LAYER}.input_layernorm.weight", "{block}/attention_norm/scale", vector),
            rule(f"{ATTENTION}.q_proj.weight", "{block}/attention/query/kernel", out_in),
            rule(f"{ATTENTION}.q_a_proj.weight", "{block}/attention/query_down/kernel", out_in),
            rule(f"{ATTENTION}.q_a_proj.bias", "{block}/attention/query_down/bias", vector),
            rule(f"{ATTENTION}.q_a_layernorm.weight", "{block}/attention/query_norm/scale", vector),
            rule(f"{ATTENTION}.q_b_proj.weight", "{block}/attention/query_up/kernel", out_in),
            rule(f"{ATTENTION}.kv_a_proj_with_mqa.weight", "{block}/attention/latent_down/kernel", out_in),
            rule(f"{ATTENTION}.kv_a_proj_with_mqa.bias", "{block}/attention/latent_down/bias", vector),
            rule(f"{ATTENTION}.kv_a_layernorm.weight", "{block}/attention/latent_norm/scale", vector),
            rule(f"{ATTENTION}.kv_b_proj.weight", "{block}/attention/latent_up/kernel", out_in),
            rule(f"{ATTENTION}.o_proj.weight", "{block}/attention/out/kernel", out_in),
            rule(f"{ATTENTION}.o_proj.bias", "{block}/attention/out/bias", vector),
            rule(f"{LAYER}.post_attention_layernorm.weight", "{block}/mlp_norm/scale", vector),
            rule(f"{LAYER}.mlp.gate_proj.weight", "{block}/mlp/gate/kernel", out_in),
            rule(f"{LAYER}.mlp.up_proj.weight", "{block}/mlp/up/kernel", out_in),
            rule(f"{LAYER}.mlp.down_proj.weight", "{block}/mlp/down/kernel", out_in),
            ROUTER,
            rule(f"{LAYER}.mlp.gate.e_score_correction_bias", "{block}/moe/bias", vector, collection="router"),
            *experts,
            rule(f"{LAYER}.mlp.shared_experts.gate_proj.weight", "{block}/moe/shared/gate/kernel", out_in),
            rule(f"{LAYER}.mlp.shared_experts.up_proj.weight", "{block}/moe/shared/up/kernel", out_in),
            rule(f"{LAYER}.mlp.shared_experts.down_proj.weight", "{block}/moe/shared/down/kernel", out_in),
            rule(f"{LAYER}.shared_head.norm.weight", "{block}/final_norm/scale", vector),
            rule("model.norm.weight", "final_norm/scale", vector),
            rule("lm_head.weight", "lm_head/kernel", out_in),
            SCORE,
        ),
        ignorable=(
            f"{ATTENTION}.rotary_emb.inv_freq",
            f"{LAYER}.embed_tokens.weight",
            f"{LAYER}.shared_head.head.weight",
        ),
        optional_prefix="model.",
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        select=own_layers,
    )


def own_layers(state: Mapping[str, Any], config: DeepSeekV3Config) -> Mapping[str, Any]:
    """The state without those modules of multi-token prediction that the config leaves out; BadInput where it wants
    modules that are not there."""
    first, wanted = config.num_hidden_layers, config.num_nextn_predict_layers
    held = 0
    while f"{LAYER.format(layer=first + held)}.{MTP_NORM}" in state:
        held += 1
    if held < wanted:
        raise BadInput(
            f"num_nextn_predict_layers={wanted} announces modules of multi-token prediction, of which the weights hold "
            f'{held}; set it to {held} in config.json, or load them with config={{"num_nextn_predict_layers": {held}}}'
        )
    left_out = tuple(f"{LAYER.format(layer=layer)}." for layer in range(first + wanted, first + held))
    if not left_out:
        return state
    warn(f"modules of multi-token prediction are left out: {len(left_out)}")
    return {name: state[name] for name in state if not name.startswith(left_out)}


def unkept(state: Mapping[str, Any], config: DeepSeekV3Config) -> dict[str, Any]:
    """The change to a config that announces modules of multi-token prediction of which the weights hold no tensor: it
    then has none. Otherwise empty."""
    first, announced = config.num_hidden_layers, config.num_nextn_predict_layers
    modules = tuple(f"{LAYER.format(layer=layer)}." for layer in range(first, first + announced))
    if not modules or any(name.startswith(modules) for name in state):
        return {}
    return {"num_nextn_predict_layers": 0}


LAYOUTS = {"hf": replace(table(*APART_EXPERTS), spellings=(table(*FUSED_EXPERTS),))}

# Fields that DeepSeek's own config.json has beside transformers', with the values that make it V3. Other programs read
# them: without, vLLM takes a softmax for the scores and has no bias for selection.
ALWAYS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


def read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, in one spelling and without those that follow from others."""
    values = read_rope(values)
    for name, only in ALWAYS.items():
        found = values.pop(name, only)
        if found != only:
            raise BadInput(f"{name}={found!r} is not supported, only {only!r}, which is DeepSeek V3's")
    heads = values.get("num_attention_heads", DeepSeekV3Config.num_attention_heads)
    key_heads = values.pop("num_key_value_heads", None)
    if key_heads not in (None, heads):
        raise BadInput(
            f"num_key_value_heads={key_heads!r} must be num_attention_heads={heads}: latents serve all heads"
        )
    return values


def write_fields(config: DeepSeekV3Config, values: dict[str, Any]) -> dict[str, Any]:
    derived = {"num_key_value_heads": config.num_attention_heads, "head_dim": config.qk_rope_head_dim}
    return write_rope(config.rope, values | derived | ALWAYS, config.qk_rope_head_dim)


_SHARED = """
    attention_bias first_k_dense_replace hidden_act kv_lora_rank moe_intermediate_size n_group n_routed_experts
    n_shared_experts norm_topk_prob num_experts_per_tok num_nextn_predict_layers q_lora_rank qk_nope_head_dim
    qk_rope_head_dim rope_interleave routed_scaling_factor topk_group v_head_dim
"""
CONFIG = ConfigTable(
    config_class=DeepSeekV3Config,
    architecture="DeepseekV3ForCausalLM",
    classifier="DeepseekV3ForSequenceClassification",
    shared=ROTARY | set(_SHARED.split()),
    names={
        "n_routed_experts": ("n_routed_experts", "num_local_experts"),
        "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers"),
    },
    own={"norm": "rms_norm", "experts": None, "mtp_hidden": "after_norm", "attention_up_bias": False},
    training=frozenset({"balance"}),
    # The first two follow from other fields; in training, `balance` alone decides on balance losses; how experts are
    # spread over devices and where DeepSeek's own code is does not matter here.
    ignored=frozenset({"head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "output_router_logits"})
    | {"pretraining_tp", "ep_size", "auto_map", "router_aux_loss_coef"},
    null=NULL_DROPOUT | {"norm_topk_prob": False, "num_nextn_predict_layers": 0, "rope_interleave": False},
    essence=with_usual_experts,
    read=read_fields,
    write=write_fields,
)
UNDERIVABLE = (
    "num_attention_heads",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
)


def derive(shapes: Mapping[str, Shape], layers: int, layout: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields, from the shapes of weights that come without a config."""
    vocab_size, hidden_size = shapes["token_embedding/embedding"]
    heads = given["num_attention_heads"]
    (latent_rank,) = shapes["attention/latent_norm/scale"]
    rotary = shapes["attention/latent_down/kernel"][0] - latent_rank
    compressed = "attention/query_up/kernel" in shapes
    queries = shapes["attention/query_up/kernel" if compressed else "attention/query/kernel"][0]
    content = queries // heads - rotary
    dense = shapes.get("mlp/down/kernel")
    sparse = {}
    if "moe/router/kernel" in shapes:
        width, shared = shapes["moe/down_kernel"][-1], shapes.get("moe/shared/down/kernel", (0,))[-1]
        sparse = {"n_routed_experts": shapes["moe/router/kernel"][0], "moe_intermediate_size": width}
        sparse["n_shared_experts"] = shared // width
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers - given["num_nextn_predict_layers"],
        "q_lora_rank": shapes["attention/query_norm/scale"][0] if compressed else None,
        "kv_lora_rank": latent_rank,
        "qk_nope_head_dim": content,
        "qk_rope_head_dim": rotary,
        "v_head_dim": shapes["attention/latent_up/kernel"][0] // heads - content,
        "attention_bias": "attention/out/bias" in shapes,
        **sparse,
        **({"intermediate_size": dense[-1]} if dense else {}),
    }
