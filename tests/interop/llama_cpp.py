"""GGUF files as llama.cpp's converter writes them: small models of transformers, with a vocabulary of bytes."""

import math

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize

from tests.interop import refusals

VOCABULARY = 300


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refused(action, path, **arguments) -> str:
    """The one line, which names the path, with which the action is refused."""
    message = refusals.refused(action, path, **arguments)
    assert str(path) in message
    return message


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.gate_proj": "ffn_gate_exps.weight",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
}
GEMMAS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
"""{transformers' model_type: llama.cpp's name, where it is another one}."""


def gguf_name(name: str, names: dict[str, str]) -> str:
    name = name.replace("model.layers.", "blk.")
    for theirs, ours in names.items():
        name = f"{name}.".replace(f"{theirs}.", f"{ours}.").removesuffix(".")
    return name


def tensors_of(model):
    """{transformers' name: array}, the experts' gates and up projections as two tensors."""
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), np.split(array, 2, axis=1), strict=True):
                yield name.replace("gate_up_proj", part), half
        else:
            yield name, array


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of query and key rows in llama.cpp: within a head, features of the two halves in turns."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(rope: dict, width: int) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight for the scaling of Llama 3.1."""
    divisors = []
    for i in range(0, width, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (i / width))
        if turns > rope["high_freq_factor"]:
            divisors.append(1.0)
        elif turns < rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def write_llama(path, model, change=None, kind="F32", experts_apart=False, **split) -> None:
    """A model of transformers as llama.cpp's converter writes it, with a vocabulary of bytes."""
    config, rope = model.config, model.config.rope_parameters
    is_llama, is_gemma = config.model_type in ("llama", "mixtral"), config.model_type.startswith("gemma")
    rope = rope.get("full_attention", rope)  # llama.cpp knows the other base of local layers by itself
    writer = GGUFWriter(path, ARCHITECTURES.get(config.model_type, config.model_type), **split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if is_llama:
        writer.add_rope_dimension_count(width)
    if width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, width))
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if is_gemma:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if change is not None:
        change(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if is_llama else {}
    for name, array in tensors_of(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if is_gemma and name.endswith("norm.weight"):
            array = array + 1
        for part, count in heads.items():
            if f".{part}." in name:
                array = permuted(array, count)
        raw_kind = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        short, parts = gguf_name(name, NAMES | GEMMAS if is_gemma else NAMES), {"": array}
        if experts_apart and "_exps" in short:
            short, parts = short.replace("_exps.weight", ".{}.weight"), dict(enumerate(array))
        for number, part in parts.items():
            stored = quantize(np.ascontiguousarray(part), raw_kind)
            writer.add_tensor(short.format(number), stored, raw_dtype=raw_kind)
    write(writer)


BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def make_model(model_type="llama", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **BASE | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases begin as zeros, norms as ones
    return model


TOKEN_TEXTS = [*(chr(0x100 + i) for i in range(VOCABULARY - 4)), "<|end|>", "<s>", "</s>", "<|eot_id|>"]


def add_vocabulary(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKEN_TEXTS)
    writer.add_token_types([1] * (VOCABULARY - 4) + [3] * 4)
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_bos_token_id(VOCABULARY - 3)
    writer.add_eos_token_id(VOCABULARY - 2)
    writer.add_chat_template("{% for m in messages %}{{ m.content + '<|eot_id|>' }}{% endfor %}")
