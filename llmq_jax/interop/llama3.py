"""Llama's weights and config in the layouts that its checkpoints come in, and Mistral's (`hf` alone, the same names).

- `hf`: transformers' `LlamaForCausalLM`. Linear layers are torch's, stored (out, in). A tied head is not in the file.
  Files of `LlamaModel`, which has no head, leave out the prefix `model.`.
- `original`: the model of the PyTorch repository that this project re-implements. Its head and its embedding are one
  tensor under two names. Its only biases are those of the attention's output (with `attention_bias=True` the other
  biases of attention are zeros, as transformers needs them). In its feed-forward network `lin1` is the gate, `lin_gate`
  the other half. Tables of RoPE and the causal mask are buffers.
- `gguf`: the names of llama.cpp. Rows of queries and keys are in another order: within each head the two halves of
  RoPE's pairs alternate, where transformers has one half after the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmq_jax.interop.configs import GROUPED, NULL_DROPOUT, ConfigTable, require_whole_heads
from llmq_jax.interop.rope import read_rope, write_rope
from llmq_jax.interop.tables import SCORE, Shape, Transform, WeightTable, as_is, out_in, rule, vector
from llmq_jax.models.llama3 import Llama3Config
from llmq_jax.models.mistral import MistralConfig


@dataclass(frozen=True)
class AlternatingHalves(Transform):
    """A transform for heads [..., H] whose features, in their tensor, alternate between the two halves of RoPE."""

    @classmethod
    def over(cls, transform: Transform) -> "AlternatingHalves":
        return cls(transform.merge, transform.transposed)

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        pairs = super().to_ours(theirs, (*shape[:-1], shape[-1] // 2, 2))
        return pairs.swapaxes(-1, -2).reshape(shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        halves = ours.reshape(*ours.shape[:-1], 2, ours.shape[-1] // 2)
        return super().to_theirs(halves.swapaxes(-1, -2).reshape(ours.shape))


LAYOUTS = {
    "hf": WeightTable(
        rules=(
            rule("model.embed_tokens.weight", "token_embedding/embedding", as_is),
            rule("model.layers.{layer}.input_layernorm.weight", "{block}/attention_norm/scale", vector),
            rule("model.layers.{layer}.self_attn.q_proj.weight", "{block}/attention/query/kernel", out_in),
            rule("model.layers.{layer}.self_attn.q_proj.bias", "{block}/attention/query/bias", vector),
            rule("model.layers.{layer}.self_attn.k_proj.weight", "{block}/attention/key/kernel", out_in),
            rule("model.layers.{layer}.self_attn.k_proj.bias", "{block}/attention/key/bias", vector),
            rule("model.layers.{layer}.self_attn.v_proj.weight", "{block}/attention/value/kernel", out_in),
            rule("model.layers.{layer}.self_attn.v_proj.bias", "{block}/attention/value/bias", vector),
            rule("model.layers.{layer}.self_attn.o_proj.weight", "{block}/attention/out/kernel", out_in),
            rule("model.layers.{layer}.self_attn.o_proj.bias", "{block}/attention/out/bias", vector),
            rule("model.layers.{layer}.post_attention_layernorm.weight", "{block}/mlp_norm/scale", vector),
            rule("model.layers.{layer}.mlp.gate_proj.weight", "{block}/mlp/gate/kernel", out_in),
            rule("model.layers.{layer}.mlp.gate_proj.bias", "{block}/mlp/gate/bias", vector),
            rule("model.layers.{layer}.mlp.up_proj.weight", "{block}/mlp/up/kernel", out_in),
            rule("model.layers.{layer}.mlp.up_proj.bias", "{block}/mlp/up/bias", vector),
            rule("model.layers.{layer}.mlp.down_proj.weight", "{block}/mlp/down/kernel", out_in),
            rule("model.layers.{layer}.mlp.down_proj.bias", "{block}/mlp/down/bias", vector),
            rule("model.norm.weight", "final_norm/scale", vector),
            rule("lm_head.weight", "lm_head/kernel", out_in),
            SCORE,
        ),
        ignorable=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
        optional_prefix="model.",
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "original": WeightTable(
        rules=(
            rule("emb_dict.weight", "token_embedding/embedding", as_is),
            rule("trf_blocks.{layer}.norm_1.scale", "{block}/attention_norm/scale", vector),
            rule("trf_blocks.{layer}.att.w_queries.weight", "{block}/attention/query/kernel", out_in),
            rule("trf_blocks.{layer}.att.w_keys.weight", "{block}/attention/key/kernel", out_in),
            rule("trf_blocks.{layer}.att.w_values.weight", "{block}/attention/value/kernel", out_in),
            rule("trf_blocks.{layer}.att.w_queries.bias", "{block}/attention/query/bias", vector, optional=True),
            rule("trf_blocks.{layer}.att.w_keys.bias", "{block}/attention/key/bias", vector, optional=True),
            rule("trf_blocks.{layer}.att.w_values.bias", "{block}/attention/value/bias", vector, optional=True),
            rule("trf_blocks.{layer}.att.out_proj.weight", "{block}/attention/out/kernel", out_in),
            rule("trf_blocks.{layer}.att.out_proj.bias", "{block}/attention/out/bias", vector),
            rule("trf_blocks.{layer}.norm_2.scale", "{block}/mlp_norm/scale", vector),
            rule("trf_blocks.{layer}.ffn.lin1.weight", "{block}/mlp/gate/kernel", out_in),
            rule("trf_blocks.{layer}.ffn.lin_gate.weight", "{block}/mlp/up/kernel", out_in),
            rule("trf_blocks.{layer}.ffn.lin2.weight", "{block}/mlp/down/kernel", out_in),
            rule("final_ln.scale", "final_norm/scale", vector),
        ),
        ignorable=("mask", "cos", "sin"),
        tied={"out.weight": "emb_dict.weight"},
        writes_tied=True,
    ),
    "gguf": WeightTable(
        rules=(
            rule("token_embd.weight", "token_embedding/embedding", as_is),
            rule("blk.{layer}.attn_norm.weight", "{block}/attention_norm/scale", vector),
            rule("blk.{layer}.attn_q.weight", "{block}/attention/query/kernel", AlternatingHalves.over(out_in)),
            rule("blk.{layer}.attn_q.bias", "{block}/attention/query/bias", AlternatingHalves.over(vector)),
            rule("blk.{layer}.attn_k.weight", "{block}/attention/key/kernel", AlternatingHalves.over(out_in)),
            rule("blk.{layer}.attn_k.bias", "{block}/attention/key/bias", AlternatingHalves.over(vector)),
            rule("blk.{layer}.attn_v.weight", "{block}/attention/value/kernel", out_in),
            rule("blk.{layer}.attn_v.bias", "{block}/attention/value/bias", vector),
            rule("blk.{layer}.attn_output.weight", "{block}/attention/out/kernel", out_in),
            rule("blk.{layer}.attn_output.bias", "{block}/attention/out/bias", vector),
            rule("blk.{layer}.ffn_norm.weight", "{block}/mlp_norm/scale", vector),
            rule("blk.{layer}.ffn_gate.weight", "{block}/mlp/gate/kernel", out_in),
            rule("blk.{layer}.ffn_gate.bias", "{block}/mlp/gate/bias", vector),
            rule("blk.{layer}.ffn_up.weight", "{block}/mlp/up/kernel", out_in),
            rule("blk.{layer}.ffn_up.bias", "{block}/mlp/up/bias", vector),
            rule("blk.{layer}.ffn_down.weight", "{block}/mlp/down/kernel", out_in),
            rule("blk.{layer}.ffn_down.bias", "{block}/mlp/down/bias", vector),
            rule("output_norm.weight", "final_norm/scale", vector),
            rule("output.weight", "lm_head/kernel", out_in),
        ),
        ignorable=("rope_freqs.weight",),
        tied={"output.weight": "token_embd.weight"},
    ),
}


def in_halves(table: WeightTable) -> WeightTable:
    """The table with the rows of queries and keys in transformers' order, as in GGUF files of other architectures."""
    plain = (
        entry._replace(transform=Transform(entry.transform.merge, entry.transform.transposed)) for entry in table.rules
    )
    return replace(table, rules=tuple(plain))


def write_fields(config: Llama3Config, values: dict[str, Any]) -> dict[str, Any]:
    """The config.json with sizes written out. BadInput: a width that transformers' Llama does not take."""
    require_whole_heads(config)
    return write_sizes(config, values)


def write_sizes(config: Llama3Config, values: dict[str, Any]) -> dict[str, Any]:
    """The config.json with sizes written out, as transformers does: not all readers know what null stands for."""
    sizes = {"num_key_value_heads": config.key_value_heads, "head_dim": config.head_width}
    return write_rope(config.rope, values | sizes, config.head_width)


OWN = {"norm": "rms_norm", "experts": None, "attention_output_bias": None}
"""Fields that transformers has in no model that is built like Llama, as in `ConfigTable.own`."""

CONFIG = ConfigTable(
    config_class=Llama3Config,
    architecture="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    shared=GROUPED | {"attention_bias", "hidden_act", "mlp_bias"},
    own=OWN,
    remedies={"attention_output_bias": "load its weights with attention_bias=True, and the other biases are zeros"},
    ignored=frozenset({"pretraining_tp"}),
    null=NULL_DROPOUT,
    read=read_rope,
    write=write_fields,
)

MISTRAL_LAYOUTS = {"hf": LAYOUTS["hf"]}
MISTRAL_OWN = OWN | {"attention_bias": False, "mlp_bias": False}
MISTRAL_CONFIG = ConfigTable(
    config_class=MistralConfig,
    architecture="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    shared=GROUPED | {"hidden_act", "sliding_window"},
    own=MISTRAL_OWN,
    read=read_rope,
    write=write_sizes,
)


def derive(shapes: Mapping[str, Shape], layers: int, layout: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields of weights that come without a config; shapes do not tell the number of heads."""
    return derive_sizes(shapes, layers, given) | {
        "rms_norm_eps": 1e-5 if layout == "original" else Llama3Config.rms_norm_eps,
        "attention_output_bias": "attention/out/bias" in shapes,
        "intermediate_size": gated_width(shapes),
        "mlp_bias": "mlp/gate/bias" in shapes,
    }


def derive_sizes(shapes: Mapping[str, Shape], layers: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that shapes tell of any decoder with grouped-query attention."""
    vocab_size, hidden_size = shapes["token_embedding/embedding"]
    queries, keys = (shapes[f"attention/{name}/kernel"][0] for name in ("query", "key"))
    head_dim = queries // given["num_attention_heads"]
    return {
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "attention_bias": "attention/query/bias" in shapes,
    }


def gated_width(shapes: Mapping[str, Shape]) -> int:
    """The width of a gated feed-forward network, from the shapes of its matrices."""
    _, hidden_size = shapes["token_embedding/embedding"]
    return math.prod(shapes["mlp/gate/kernel"]) // hidden_size
