"""GPT-2's weights and config in the layouts that its checkpoints come in.

- `hf`: transformers' `GPT2LMHeadModel`. Its linear layers are Conv1D, stored (in, out): nothing is transposed. Queries,
  keys and values stand side by side in `c_attn`, in this order. The file of the original weights has no `transformer.`
  prefix, and older ones carry each layer's causal mask as a buffer.
- `openai`: the variables of OpenAI's TensorFlow release (openai/gpt-2, `src/model.py`): the same, but linear layers are
  convolutions of width 1, stored (1, in, out), and norms have a gain `g`. The head is always tied.
- `book`: `GPTModel` of LLMs-from-scratch (Raschka 2024, chapter 4), whose linear layers are torch's (out, in).
- `original`: the model of the PyTorch repository that this project re-implements; as the book's, with other names.
- `nanogpt`: the model of karpathy/nanoGPT. Its names are those of `hf`, its linear layers torch's (out, in). Built with
  `bias=False` it has no biases, neither in linear layers nor in norms.

`book` and `original` keep queries, keys and values apart, without biases unless built with `qkv_bias=True`. Absent
biases become zeros here and are written on export, for a model built with `qkv_bias=True`. The same holds for all
biases of `nanogpt`, and `bias=True`. These three layouts store a head even where it equals the embedding, and their
masks are buffers.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llmq_jax.interop.configs import ConfigTable
from llmq_jax.interop.tables import SCORE, Shape, WeightTable, as_is, convolution, in_out, out_in, rule, vector
from llmq_jax.models.gpt2 import GPT2Config

# Where queries, keys and values are in our leaves, kernel [D, 3, N, H] and bias [3, N, H].
Q, K, V = (np.s_[..., part, :, :] for part in range(3))

LAYOUTS = {
    "hf": WeightTable(
        rules=(
            rule("transformer.wte.weight", "token_embedding/embedding", as_is),
            rule("transformer.wpe.weight", "position_embedding/embedding", as_is),
            rule("transformer.h.{layer}.ln_1.weight", "{block}/attention_norm/scale", vector),
            rule("transformer.h.{layer}.ln_1.bias", "{block}/attention_norm/bias", vector),
            rule("transformer.h.{layer}.attn.c_attn.weight", "{block}/attention/qkv/kernel", in_out),
            rule("transformer.h.{layer}.attn.c_attn.bias", "{block}/attention/qkv/bias", vector),
            rule("transformer.h.{layer}.attn.c_proj.weight", "{block}/attention/out/kernel", in_out),
            rule("transformer.h.{layer}.attn.c_proj.bias", "{block}/attention/out/bias", vector),
            rule("transformer.h.{layer}.ln_2.weight", "{block}/mlp_norm/scale", vector),
            rule("transformer.h.{layer}.ln_2.bias", "{block}/mlp_norm/bias", vector),
            rule("transformer.h.{layer}.mlp.c_fc.weight", "{block}/mlp/up/kernel", in_out),
            rule("transformer.h.{layer}.mlp.c_fc.bias", "{block}/mlp/up/bias", vector),
            rule("transformer.h.{layer}.mlp.c_proj.weight", "{block}/mlp/down/kernel", in_out),
            rule("transformer.h.{layer}.mlp.c_proj.bias", "{block}/mlp/down/bias", vector),
            rule("transformer.ln_f.weight", "final_norm/scale", vector),
            rule("transformer.ln_f.bias", "final_norm/bias", vector),
            rule("lm_head.weight", "lm_head/kernel", out_in),
            SCORE,
        ),
        ignorable=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
        optional_prefix="transformer.",
        tied={"lm_head.weight": "transformer.wte.weight"},
    ),
    "openai": WeightTable(
        rules=(
            rule("model/wte", "token_embedding/embedding", as_is),
            rule("model/wpe", "position_embedding/embedding", as_is),
            rule("model/h{layer}/ln_1/g", "{block}/attention_norm/scale", vector),
            rule("model/h{layer}/ln_1/b", "{block}/attention_norm/bias", vector),
            rule("model/h{layer}/attn/c_attn/w", "{block}/attention/qkv/kernel", convolution),
            rule("model/h{layer}/attn/c_attn/b", "{block}/attention/qkv/bias", vector),
            rule("model/h{layer}/attn/c_proj/w", "{block}/attention/out/kernel", convolution),
            rule("model/h{layer}/attn/c_proj/b", "{block}/attention/out/bias", vector),
            rule("model/h{layer}/ln_2/g", "{block}/mlp_norm/scale", vector),
            rule("model/h{layer}/ln_2/b", "{block}/mlp_norm/bias", vector),
            rule("model/h{layer}/mlp/c_fc/w", "{block}/mlp/up/kernel", convolution),
            rule("model/h{layer}/mlp/c_fc/b", "{block}/mlp/up/bias", vector),
            rule("model/h{layer}/mlp/c_proj/w", "{block}/mlp/down/kernel", convolution),
            rule("model/h{layer}/mlp/c_proj/b", "{block}/mlp/down/bias", vector),
            rule("model/ln_f/g", "final_norm/scale", vector),
            rule("model/ln_f/b", "final_norm/bias", vector),
        ),
    ),
    "book": WeightTable(
        rules=(
            rule("tok_emb.weight", "token_embedding/embedding", as_is),
            rule("pos_emb.weight", "position_embedding/embedding", as_is),
            rule("trf_blocks.{layer}.norm1.scale", "{block}/attention_norm/scale", vector),
            rule("trf_blocks.{layer}.norm1.shift", "{block}/attention_norm/bias", vector),
            rule("trf_blocks.{layer}.att.W_query.weight", "{block}/attention/qkv/kernel", out_in, at=Q),
            rule("trf_blocks.{layer}.att.W_key.weight", "{block}/attention/qkv/kernel", out_in, at=K),
            rule("trf_blocks.{layer}.att.W_value.weight", "{block}/attention/qkv/kernel", out_in, at=V),
            rule("trf_blocks.{layer}.att.W_query.bias", "{block}/attention/qkv/bias", vector, at=Q, optional=True),
            rule("trf_blocks.{layer}.att.W_key.bias", "{block}/attention/qkv/bias", vector, at=K, optional=True),
            rule("trf_blocks.{layer}.att.W_value.bias", "{block}/attention/qkv/bias", vector, at=V, optional=True),
            rule("trf_blocks.{layer}.att.out_proj.weight", "{block}/attention/out/kernel", out_in),
            rule("trf_blocks.{layer}.att.out_proj.bias", "{block}/attention/out/bias", vector),
            rule("trf_blocks.{layer}.norm2.scale", "{block}/mlp_norm/scale", vector),
            rule("trf_blocks.{layer}.norm2.shift", "{block}/mlp_norm/bias", vector),
            rule("trf_blocks.{layer}.ff.layers.0.weight", "{block}/mlp/up/kernel", out_in),
            rule("trf_blocks.{layer}.ff.layers.0.bias", "{block}/mlp/up/bias", vector),
            rule("trf_blocks.{layer}.ff.layers.2.weight", "{block}/mlp/down/kernel", out_in),
            rule("trf_blocks.{layer}.ff.layers.2.bias", "{block}/mlp/down/bias", vector),
            rule("final_norm.scale", "final_norm/scale", vector),
            rule("final_norm.shift", "final_norm/bias", vector),
            rule("out_head.weight", "lm_head/kernel", out_in),
        ),
        ignorable=("trf_blocks.{layer}.att.mask",),
        tied={"out_head.weight": "tok_emb.weight"},
        writes_tied=True,
    ),
}

ORIGINAL_NAMES = {
    "tok_emb": "emb_dict",
    "pos_emb": "pos_emb_dict",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "W_query": "w_queries",
    "W_key": "w_keys",
    "W_value": "w_values",
    "ff": "ffn",
    "final_norm": "final_ln",
    "out_head": "out",
}
"""{part of a name in `book`: the part in `original`}; all other parts are the same."""


def original(name: str) -> str:
    return ".".join(ORIGINAL_NAMES.get(part, part) for part in name.split("."))


LAYOUTS["original"] = replace(
    LAYOUTS["book"],
    rules=tuple(entry._replace(key=original(entry.key)) for entry in LAYOUTS["book"].rules),
    tied={original(key): original(source) for key, source in LAYOUTS["book"].tied.items()},
)
# The names of `hf`, with torch's linear layers, and without biases in some files.
LAYOUTS["nanogpt"] = replace(
    LAYOUTS["hf"],
    rules=tuple(
        entry._replace(
            transform=out_in if entry.transform is in_out else entry.transform,
            optional=entry.path.endswith("/bias"),
        )
        for entry in LAYOUTS["hf"].rules
        if entry is not SCORE
    ),
    ignorable=("transformer.h.{layer}.attn.bias",),
    optional_prefix="",
    writes_tied=True,
)

_SHARED = """
    activation_function attn_pdrop embd_pdrop initializer_range layer_norm_epsilon resid_pdrop
    scale_attn_by_inverse_layer_idx tie_word_embeddings vocab_size
"""
CONFIG = ConfigTable(
    config_class=GPT2Config,
    architecture="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    shared=frozenset(_SHARED.split()),
    names={
        "max_position_embeddings": ("n_positions",),
        "hidden_size": ("n_embd",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "intermediate_size": ("n_inner",),
    },
    fixed={
        "add_cross_attention": False,
        "scale_attn_weights": True,
    },
    ignored=frozenset(
        {
            "n_ctx",  # n_positions once more, which nothing reads but llama.cpp
            "reorder_and_upcast_attn",  # scores in float32, which ours always are
            # The pooling of GPT2DoubleHeadsModel.
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    own={"norm": "layer_norm", "experts": None},
    write=lambda config, values: values | {"n_ctx": config.max_position_embeddings},
)


def derive(shapes: Mapping[str, Shape], layers: int, layout: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields of weights that come without a config; shapes do not tell the number of heads."""
    vocab_size, hidden_size = shapes["token_embedding/embedding"]
    positions, _ = shapes["position_embedding/embedding"]
    width = math.prod(shapes["mlp/up/kernel"]) // hidden_size
    return {
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": None if width == 4 * hidden_size else width,
        "activation_function": "gelu" if layout in ("original", "nanogpt") else "gelu_new",
    }
