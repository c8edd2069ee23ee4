"""The layouts and config.json of Mistral, Qwen 2 and Qwen 3: names and shapes, files of the hub, windows, refusals."""

import jax
import numpy as np
import pytest
import torch
import transformers

import llmq_jax as lq
from llmq_jax.interop import config_from_hf, config_from_state_dict, config_to_hf, from_state_dict, to_state_dict
from llmq_jax.models import override, preset
from llmq_jax.models.config import GLOBAL, LOCAL
from tests.interop.refusals import refused
from tests.weights import draw_variables

# V 11, D 12, N 3, K 1, H 6 (not 12 / 3), F 10.
SIZES = {
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 10,
}
CONFIGS = {
    "mistral": lq.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lq.Qwen2Config(**SIZES),
    "qwen3": lq.Qwen3Config(**SIZES),
}


pytestmark = pytest.mark.filterwarnings("error")


LATENTS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 6, "v_head_dim": 8}
LATENTS |= {"num_key_value_heads": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LATENTS |= {"first_k_dense_replace": 1, "moe_intermediate_size": 8, "num_nextn_predict_layers": 0}
OTHERS = {"gemma2": {"sliding_window": 5}, "gemma3_text": {"sliding_window": 5}, "deepseek_v3": LATENTS}


@pytest.mark.parametrize("model_type", ["llama", *CONFIGS, *OTHERS])
def test_files_of_the_model_without_a_head(tmp_path, model_type):
    """transformers' `AutoModel` writes its names without a prefix; with a tied head all weights are there."""
    sizes = SIZES | OTHERS.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **sizes, tie_word_embeddings=True)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = np.arange(11)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(lq.load(tmp_path).logits(tokens), expected, atol=1e-5)
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    assert "1 missing (lm_head.weight)" in refused(lq.load, tmp_path)


# Weights.

LLAMA = {
    "model.embed_tokens.weight": (11, 12),
    "model.layers.{layer}.input_layernorm.weight": (12,),
    "model.layers.{layer}.self_attn.q_proj.weight": (18, 12),
    "model.layers.{layer}.self_attn.k_proj.weight": (6, 12),
    "model.layers.{layer}.self_attn.v_proj.weight": (6, 12),
    "model.layers.{layer}.self_attn.o_proj.weight": (12, 18),
    "model.layers.{layer}.post_attention_layernorm.weight": (12,),
    "model.layers.{layer}.mlp.gate_proj.weight": (10, 12),
    "model.layers.{layer}.mlp.up_proj.weight": (10, 12),
    "model.layers.{layer}.mlp.down_proj.weight": (12, 10),
    "model.norm.weight": (12,),
    "lm_head.weight": (11, 12),
}
MORE = {
    "mistral": {},
    "qwen2": {
        "model.layers.{layer}.self_attn.q_proj.bias": (18,),
        "model.layers.{layer}.self_attn.k_proj.bias": (6,),
        "model.layers.{layer}.self_attn.v_proj.bias": (6,),
    },
    "qwen3": {
        "model.layers.{layer}.self_attn.q_norm.weight": (6,),
        "model.layers.{layer}.self_attn.k_norm.weight": (6,),
    },
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_names_and_shapes_there_and_back(model_type):
    config = CONFIGS[model_type]
    variables = draw_variables(config)
    state = to_state_dict(variables, config)
    expected = {
        name.format(layer=layer): shape for name, shape in (LLAMA | MORE[model_type]).items() for layer in range(2)
    }
    assert {name: array.shape for name, array in state.items()} == expected
    back = from_state_dict(state, config)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


GIVEN = {"num_attention_heads": 3, "max_position_embeddings": 64, "rope_parameters": {}, "rms_norm_eps": 1e-6}


def test_the_config_from_shapes():
    """Qwen 3 by its norms. The others have the names of a Llama alone, and are one that computes the same."""
    state = to_state_dict(draw_variables(CONFIGS["qwen3"]), CONFIGS["qwen3"])
    assert config_from_state_dict(state, **GIVEN) == CONFIGS["qwen3"]
    state = to_state_dict(draw_variables(CONFIGS["qwen2"]), CONFIGS["qwen2"])
    llama = lq.Llama3Config(**SIZES, attention_bias=True, attention_output_bias=False)
    assert config_from_state_dict(state, **GIVEN) == llama
    assert from_state_dict(state, llama).keys() == from_state_dict(state, CONFIGS["qwen2"]).keys()


# config.json.

QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""Of Qwen/Qwen2.5-0.5B-Instruct, in the spelling of its time."""
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""Of Qwen/Qwen3-0.6B."""
QWEN_3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""Of Qwen/Qwen3-30B-A3B."""
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
"""Of mistralai/Mistral-7B-v0.1."""


def test_files_of_the_hub():
    assert config_from_hf(QWEN_2_5) == preset("qwen2.5-0.5b")
    assert config_from_hf(QWEN_2_5 | {"use_mrope": False}) == preset("qwen2.5-0.5b")
    assert config_from_hf(QWEN_3) == preset("qwen3-0.6b")
    assert config_from_hf(QWEN_3_MOE) == preset("qwen3-30b-a3b")
    # What Qwen3-Coder-30B-A3B has besides.
    coder = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True, "max_window_layers": 28}
    coder |= {"max_position_embeddings": 262144, "rope_theta": 10000000}
    assert config_from_hf(QWEN_3_MOE | coder).rope.rope_theta == 1e7
    written = config_to_hf(preset("qwen3-30b-a3b"))
    assert written.items() >= {"num_experts": 128, "mlp_only_layers": [], "head_dim": 128}.items()
    assert "num_local_experts" not in written
    assert config_from_hf(MISTRAL_7B) == preset("mistral-7b-v0.1")
    third = {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
    assert config_from_hf(MISTRAL_7B | third) == preset("mistral-7b-v0.3")


def test_long_contexts_as_qwen_s_model_cards_have_them():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    rope = config_from_hf(QWEN_2_5 | {"max_position_embeddings": 131072, "rope_scaling": scaling}).rope
    assert rope == lq.layers.positions.YarnRope(1e6, factor=4.0, original_max_position_embeddings=32768)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    with pytest.warns(UserWarning, match="rope_type 'yarn' has factor=4.0, which counts, and max_position_embeddings="):
        assert config_from_hf(QWEN_3 | {"rope_scaling": scaling}).rope == rope


SMALL = {**SIZES, "num_hidden_layers": 3}
USED = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("spelling", "windows"),
    [
        ({}, [None] * 3),
        ({"sliding_window": 5, "max_window_layers": 1}, [None] * 3),
        ({"use_sliding_window": True, "max_window_layers": 0}, [4096] * 3),
        (USED, [None] * 3),  # from layer 28 on
        ({**USED, "sliding_window": None, "max_window_layers": 0}, [None] * 3),
        ({**USED, "max_window_layers": 2}, [None, None, 5]),
        ({**USED, "max_window_layers": 0}, [5] * 3),
        ({**USED, "layer_types": None, "max_window_layers": 2}, [None, None, 5]),
        ({**USED, "layer_types": [LOCAL, GLOBAL, LOCAL], "max_window_layers": 0}, [5, None, 5]),
        ({**USED, "layer_types": [GLOBAL] * 3, "max_window_layers": 0}, [None] * 3),
        ({"sliding_window": None, "layer_types": [GLOBAL] * 3}, [None] * 3),
    ],
)
def test_spellings_of_windows(model_type, spelling, windows):
    config = config_from_hf({"model_type": model_type, **SMALL, **spelling})
    assert list(config.layer_windows) == windows
    theirs = transformers.AutoConfig.for_model(model_type, **SMALL, **spelling)
    assert [theirs.sliding_window if kind == LOCAL else None for kind in theirs.layer_types] == windows
    written = config_to_hf(config)
    assert config_from_hf(written) == config
    # And by those who do not know layer_types.
    if "layer_types" not in spelling:
        del written["layer_types"]
        assert config_from_hf(written) == config


@pytest.mark.parametrize(
    ("spelling", "window"),
    [
        ({}, None),
        ({"sliding_window": 5}, None),
        ({"use_sliding_window": True}, 4096),
        ({**USED, "sliding_window": None}, None),
    ]
    + [({**USED, "max_window_layers": layer}, 5) for layer in (0, 2, 28)],
)
def test_a_window_beside_experts_is_of_all_layers(spelling, window):
    config = config_from_hf({"model_type": "qwen3_moe", **SMALL, **spelling})
    assert config.layer_windows == (window,) * 3
    assert transformers.Qwen3MoeConfig(**SMALL, **spelling).sliding_window == window
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("kinds", "window"), [([GLOBAL, LOCAL, GLOBAL], 4096), ([LOCAL] * 3, 4096), ([GLOBAL] * 3, None), (None, 4096)]
)
def test_a_mistral_with_kinds_of_layers_is_a_ministral(kinds, window):
    """As transformers' AutoConfig reads it; the kinds decide, whatever window is named."""
    values = {"model_type": "mistral", **SMALL, "sliding_window": 4096, "layer_types": kinds}
    config = config_from_hf(values)
    assert config.layer_windows == tuple(None if kind == GLOBAL else window for kind in kinds or [LOCAL] * 3)
    assert config.model_type == "ministral"
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"num_experts": 0}, "num_local_experts=0 must be at least 1"),
        ("qwen3_moe", {"num_experts": 64, "num_local_experts": 128}, "are one field; keep one of them"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers=1 is not of the type"),
        ("qwen3_moe", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647 must be at most 10,000"),
        ("mistral", {"sliding_window": 0}, "MistralConfig.sliding_window=0 must be at least 1"),
        ("mistral", {"layer_types": ["chunked_attention"] * 3}, "has 'chunked_attention', which is neither"),
        ("ministral", {"layer_types": [LOCAL] * 3, "sliding_window": None}, f"has {LOCAL}, and sliding_window is None"),
        ("mistral", {"sliding_window": 4.5}, "sliding_window=4.5 is not of the type"),
        ("mistral", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ("qwen2", {**USED, "max_window_layers": 0, "sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window=1 is not of the type bool"),
        ("qwen2", {"max_window_layers": "2"}, "max_window_layers='2' is not of the type int"),
        ("qwen2", {**USED, "num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 is beyond all models"),
        ("qwen3", {"layer_types": [LOCAL] * 3}, f"has {LOCAL}, and sliding_window is None"),
        ("qwen3", {**USED, "layer_types": [LOCAL] * 2}, "has 2 kinds for num_hidden_layers=3"),
        ("qwen3", {**USED, "layer_types": ["chunked_attention"] * 3}, "has 'chunked_attention', which is neither"),
        ("qwen3", {**USED, "layer_types": LOCAL}, "layer_types='sliding_attention' is not of the type"),
        ("qwen3", {"head_dim": 5}, "head_dim=5 gives heads of 5 features, but RoPE turns pairs"),
    ],
)
def test_what_makes_no_sense_is_refused(model_type, changes, message):
    assert message in refused(config_from_hf, {"model_type": model_type, **SMALL, **changes})


def test_a_window_without_a_layer_that_has_it_is_refused():
    message = refused(override, CONFIGS["qwen3"], sliding_window=5, layer_types=[GLOBAL] * 2)
    assert message == f"Qwen3Config.sliding_window=5 has no effect, since layer_types has no {LOCAL}"


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        *(("mistral", {name: True}) for name in ("attention_bias", "attention_output_bias", "mlp_bias")),
        *(("qwen2", field) for field in ({"attention_bias": False}, {"attention_output_bias": True})),
        *(("qwen3", {name: True}) for name in ("attention_output_bias", "mlp_bias")),
        *((model_type, {"norm": "layer_norm"}) for model_type in CONFIGS),
    ],
)
def test_what_transformers_does_not_compute_cannot_be_exported(model_type, field):
    message = refused(config_to_hf, override(CONFIGS[model_type], **field))
    assert f"cannot be exported: transformers' {model_type} does not compute it" in message


def test_biases_of_attention_are_not_asked_of_qwen_2():
    """transformers passes the field over, and so it says nothing here."""
    with pytest.warns(UserWarning, match="unknown fields are ignored: attention_bias"):
        assert config_from_hf(QWEN_2_5 | {"attention_bias": False}) == preset("qwen2.5-0.5b")
