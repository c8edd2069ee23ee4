"""What tests of PEFT's adapters share: tiny models on both sides, random adapters, folders that differ from them."""

import json

import jax
import peft
import torch
from safetensors.numpy import load_file, save_file

from tests.parity.decoders import make_pair

SIZES = {
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
FIELDS = {
    "gpt2": {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "llama": SIZES | {"num_key_value_heads": 2, "attention_bias": True},
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 10},
    "gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
    "gemma3_text": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
    "mixtral": SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SIZES
    | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    | {"norm_topk_prob": True},
    "deepseek_v3": SIZES
    | {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"moe_intermediate_size": 20, "num_key_value_heads": 4, "num_nextn_predict_layers": 0},
}


def base_pair(model_type, folder):
    """(a function that gives transformers' model anew, ours)."""
    theirs, lm = make_pair(model_type, FIELDS[model_type])
    theirs.save_pretrained(folder)
    return lambda: type(theirs).from_pretrained(folder, attn_implementation="eager").eval(), lm


def adapted_by(model, spec):
    """PEFT's model with random adapters, the same whatever ran before; small, so that attention stays smooth.

    PEFT's own random ones, times a large alpha, turn float32 noise of 1e-6 into 1e-4 at single tokens.
    """
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, spec).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
    return adapted


def moved(lm, size=0.05):
    """The same with other adapters than fresh ones."""
    leaves, structure = jax.tree.flatten(lm.variables["lora"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [leaf + size * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return lm.replace(variables={**lm.variables, "lora": jax.tree.unflatten(structure, noise)})


def changed(folder, target, config=None, tensors=None):
    """A copy of an adapter with other fields, or with tensors that `tensors` makes of its own."""
    target.mkdir()
    values = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(values))
    state = load_file(folder / "adapter_model.safetensors")
    save_file(tensors(state) if tensors else state, target / "adapter_model.safetensors")
    return target
