"""Mixtral's weights and config.

- `hf`: transformers' `MixtralForCausalLM`, which is Llama but for its experts. Linear layers are torch's, stored (out,
  in). Files hold one tensor for each matrix of each expert: w1 is the gate, w3 the up projection that it multiplies, w2
  the down projection. Others hold all experts of a layer in one tensor, as transformers has them in memory
  (`gate_up_proj`: the gate's rows first). Both are read, one or the other throughout; the former is written.
- `gguf`: llama.cpp's names for Llama, and one tensor for each of the three matrices of all experts; in files from
  before April 2024 one for each matrix of each expert.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from llmq_jax.interop import llama3
from llmq_jax.interop.configs import GROUPED, ConfigTable
from llmq_jax.interop.rope import read_rope
from llmq_jax.interop.tables import Shape, experts_out_in, out_in, rule
from llmq_jax.models.mixtral import MixtralConfig

# The places of an expert's gate and up projection in our leaf, which is [D, 2, F] for each expert.
GATE, UP = (np.s_[:, part, :] for part in range(2))


# As transformers has them in memory, and the files of most models.
ROUTER = rule("model.layers.{layer}.mlp.gate.weight", "{block}/moe/router/kernel", out_in)
FUSED_EXPERTS = (
    rule("model.layers.{layer}.mlp.experts.gate_up_proj", "{block}/moe/up_kernel", experts_out_in),
    rule("model.layers.{layer}.mlp.experts.down_proj", "{block}/moe/down_kernel", experts_out_in),
)
EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
APART_EXPERTS = (
    rule(f"{EXPERT}.gate_proj.weight", "{block}/moe/up_kernel", out_in, at=GATE),
    rule(f"{EXPERT}.up_proj.weight", "{block}/moe/up_kernel", out_in, at=UP),
    rule(f"{EXPERT}.down_proj.weight", "{block}/moe/down_kernel", out_in),
)

FUSED = llama3.LAYOUTS["hf"].with_rules("final_norm/scale", ROUTER, *FUSED_EXPERTS)
MOE = "model.layers.{layer}.block_sparse_moe"
APART = llama3.LAYOUTS["hf"].with_rules(
    "final_norm/scale",
    rule(f"{MOE}.gate.weight", "{block}/moe/router/kernel", out_in),
    rule(f"{MOE}.experts.{{expert}}.w1.weight", "{block}/moe/up_kernel", out_in, at=GATE),
    rule(f"{MOE}.experts.{{expert}}.w2.weight", "{block}/moe/down_kernel", out_in),
    rule(f"{MOE}.experts.{{expert}}.w3.weight", "{block}/moe/up_kernel", out_in, at=UP),
)
GGUF_ROUTER = rule("blk.{layer}.ffn_gate_inp.weight", "{block}/moe/router/kernel", out_in)
GGUF_EXPERTS = (
    GGUF_ROUTER,
    rule("blk.{layer}.ffn_gate_exps.weight", "{block}/moe/up_kernel", experts_out_in, at=(..., 0, np.s_[:])),
    rule("blk.{layer}.ffn_up_exps.weight", "{block}/moe/up_kernel", experts_out_in, at=(..., 1, np.s_[:])),
    rule("blk.{layer}.ffn_down_exps.weight", "{block}/moe/down_kernel", experts_out_in),
)
GGUF_APART = llama3.LAYOUTS["gguf"].with_rules(
    "final_norm/scale",
    GGUF_ROUTER,
    rule("blk.{layer}.ffn_gate.{expert}.weight", "{block}/moe/up_kernel", out_in, at=GATE),
    rule("blk.{layer}.ffn_up.{expert}.weight", "{block}/moe/up_kernel", out_in, at=UP),
    rule("blk.{layer}.ffn_down.{expert}.weight", "{block}/moe/down_kernel", out_in),
)
GGUF = llama3.LAYOUTS["gguf"].with_rules("final_norm/scale", *GGUF_EXPERTS)
LAYOUTS = {"hf": replace(APART, spellings=(FUSED,)), "gguf": replace(GGUF, spellings=(GGUF_APART,))}


def with_usual_experts(config: Any) -> Any:
    """The config without its `experts` where these compute what its other fields say: how tokens come to their experts
    makes no difference (unless some are dropped), and what keeps the load even none outside of training."""
    experts, usual = config.experts, config.usual_experts
    if experts is None or usual is None:
        return config
    changed = {entry.name for entry in fields(experts) if getattr(experts, entry.name) != getattr(usual, entry.name)}
    return replace(config, experts=None) if changed <= {"dispatch", "balance"} else config


CONFIG = ConfigTable(
    config_class=MixtralConfig,
    architecture="MixtralForCausalLM",
    classifier="MixtralForSequenceClassification",
    shared=GROUPED
    | {"hidden_act", "num_experts_per_tok", "num_local_experts", "router_aux_loss_coef", "sliding_window"},
    names={"num_local_experts": ("num_local_experts", "num_experts")},
    fixed={"router_jitter_noise": 0.0},
    own=llama3.MISTRAL_OWN,
    # It says whether transformers' loss includes the balance loss; here router_aux_loss_coef alone decides. It is not
    # written either: with it, transformers does not generate from padded prompts.
    ignored=frozenset({"output_router_logits"}),
    essence=with_usual_experts,
    read=read_rope,
    write=llama3.write_sizes,
)
UNDERIVABLE = ("num_attention_heads", "num_experts_per_tok")


def derive(shapes: Mapping[str, Shape], layers: int, layout: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields, from the shapes of weights that come without a config; they do not tell how many experts a
    token uses."""
    return llama3.derive_sizes(shapes, layers, given) | {
        "num_local_experts": shapes["moe/router/kernel"][0],
        "intermediate_size": shapes["moe/down_kernel"][-1],
    }
