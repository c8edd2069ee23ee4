"""GPT-2's weights and config in transformers' layout (`GPT2LMHeadModel`).

Its linear layers are Conv1D, stored (in, out): nothing is transposed. Queries, keys and values stand side by side in
`c_attn`, in this order. The file of the original weights has no `transformer.` prefix, and older ones carry each
layer's causal mask as a buffer.
"""

from llmq_jax.interop.configs import ConfigTable
from llmq_jax.interop.tables import WeightTable, as_is, in_out, out_in, rule, vector
from llmq_jax.models.gpt2 import GPT2Config

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
        ),
        ignorable=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
        optional_prefix="transformer.",
        tied={"lm_head.weight": "transformer.wte.weight"},
    ),
}

CONFIG = ConfigTable(
    config_class=GPT2Config,
    architecture="GPT2LMHeadModel",
    renamed={
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
    },
    # transformers has several spellings of the same two functions.
    aliases={
        "activation_function": {
            "gelu_accurate": "gelu_new",
            "gelu_fast": "gelu_new",
            "gelu_python_tanh": "gelu_new",
            "gelu_python": "gelu",
        }
    },
    fixed={
        "add_cross_attention": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    ignored=frozenset(
        {
            "n_ctx",  # n_positions once more
            "reorder_and_upcast_attn",  # scores in float32, which ours always are
            # The pooling of GPT2DoubleHeadsModel.
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    token_ids={"bos_token_id": 50256, "eos_token_id": 50256},
)
