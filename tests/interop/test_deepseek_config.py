"""DeepSeek V3's config.json: the hub's spelling and transformers', what is refused, what cannot be exported."""

import json

import pytest
import transformers

import llmq_jax as lq
from llmq_jax.interop import config_from_hf, config_to_hf
from llmq_jax.layers.moe import Experts
from llmq_jax.layers.positions import Rope, YarnRope
from llmq_jax.models import build, override, preset
from tests.interop.deepseek import PLAIN, QUANTIZATION, SIZES
from tests.interop.refusals import refused
from tests.weights import draw_variables

pytestmark = pytest.mark.filterwarnings("error")


def hub(**changes):
    """The config.json of deepseek-ai/DeepSeek-V3, in the spelling of its time."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": QUANTIZATION,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 129280,
    } | changes


def test_a_file_of_the_hub():
    config = config_from_hf(hub())
    assert config == preset("deepseek-v3")
    written = config_to_hf(config)
    assert written.items() >= {"head_dim": 64, "num_key_value_heads": 128, "num_nextn_predict_layers": 1}.items()
    assert not written.keys() & {"experts", "balance", "norm", "mtp_hidden", "attention_up_bias"}
    # What transformers does not write: to vLLM, without it, experts are chosen by a softmax and without their bias.
    own = ("scoring_func", "topk_method", "moe_layer_freq", "rope_theta")
    assert {name: written[name] for name in own} == {name: hub()[name] for name in own}
    assert config_from_hf(written) == config
    # Its own spelling and transformers' are one.
    theirs = transformers.DeepseekV3Config(**{k: v for k, v in hub().items() if k != "quantization_config"})
    assert config_from_hf(json.loads(theirs.to_json_string())) == config


@pytest.mark.parametrize(
    ("spelling", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 500.0, "rope_scaling": None}, Rope(500.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, Rope(500.0)),
        (
            {
                "rope_theta": 500.0,
                "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
            },
            YarnRope(500.0, factor=2.0, original_max_position_embeddings=32),
        ),
    ],
)
def test_spellings_of_rope(spelling, rope):
    config = config_from_hf({"model_type": "deepseek_v3", **SIZES, **spelling})
    assert config == override(PLAIN, rope_parameters=rope)


def test_groups_that_are_not_said():
    """null is one group, as in files of models that have none."""
    values = {"model_type": "deepseek_v3", **SIZES, "n_group": None, "topk_group": None, "num_key_value_heads": None}
    assert config_from_hf(values) == override(PLAIN, n_group=1, topk_group=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported, only 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 must be num_attention_heads=3: latents serve all heads"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts of topk_group=2 groups"),
        ({"topk_group": 4}, "topk_group=4 is more than n_group=3"),
        ({"n_group": 4}, "n_group=4 must divide n_routed_experts=6"),
        ({"n_routed_experts": "8"}, "n_routed_experts='8' is not of the type int"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even"),
        ({"hidden_act": "prelu"}, "hidden_act='prelu' must be one of"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_parameters.factor=0.5 must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    assert message in refused(config_from_hf, {"model_type": "deepseek_v3", **SIZES, **changes})


def test_what_leaves_the_function_of_experts_is_exported():
    for config in (PLAIN, override(PLAIN, n_shared_experts=0)):
        assert config_to_hf(override(config, experts={"dispatch": "dense", "balance": None})) == config_to_hf(config)


@pytest.mark.parametrize(
    "field",
    [
        {"experts": Experts(6, 2)},
        {"experts": {"dispatch": "capacity", "capacity_factor": 1.0}},
        {"norm": "dyt"},
        {"attention_up_bias": True},
        {"mtp_hidden": "before_norm"},
    ],
    ids=str,
)
def test_what_transformers_does_not_compute_cannot_be_exported(field, tmp_path):
    config = override(PLAIN, **field)
    (name,) = field
    message = refused(config_to_hf, config)
    assert message.startswith(f"{name}=") and "cannot be exported: transformers' deepseek_v3" in message
    lm = lq.LanguageModel(config, build(config), draw_variables(config))
    assert "cannot be exported" in refused(lq.save_hf, lm, tmp_path / "hf")


def test_other_quantisations_are_refused():
    message = refused(config_from_hf, hub(quantization_config={"quant_method": "awq", "bits": 4}))
    assert message == "quantization_config={'quant_method': 'awq', 'bits': 4} is not supported, only None"
