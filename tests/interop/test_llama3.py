"""Llama's layouts and its config.json: names and shapes, there and back, spellings of RoPE, what is refused."""

import dataclasses
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers

from llmq_jax.interop import (
    config_from_hf,
    config_from_state_dict,
    config_to_hf,
    from_state_dict,
    to_state_dict,
)
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.interop.llama3 import LAYOUTS
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.positions import DynamicRope, Llama3Rope, LongRope, Rope, YarnRope
from llmq_jax.model_files import load, save
from llmq_jax.models import build, override, preset
from llmq_jax.models.llama3 import Llama3Config
from tests.interop.refusals import refused
from tests.weights import assert_equal_trees, draw_variables

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
TIED = Llama3Config(**SIZES, tie_word_embeddings=True)
UNTIED = Llama3Config(**SIZES, attention_bias=True, mlp_bias=True)
# What the original computes: a bias on attention's output only.
ORIGINAL = override(TIED, attention_output_bias=True, rms_norm_eps=1e-5)
CONFIGS = {"hf": (TIED, UNTIED), "gguf": (TIED, UNTIED), "original": (ORIGINAL,)}


pytestmark = pytest.mark.filterwarnings("error")


# Weights.

SHAPES = {
    "hf": {
        "model.embed_tokens.weight": (11, 12),
        "model.layers.{layer}.input_layernorm.weight": (12,),
        "model.layers.{layer}.self_attn.q_proj.weight": (18, 12),
        "model.layers.{layer}.self_attn.q_proj.bias": (18,),
        "model.layers.{layer}.self_attn.k_proj.weight": (6, 12),
        "model.layers.{layer}.self_attn.k_proj.bias": (6,),
        "model.layers.{layer}.self_attn.v_proj.weight": (6, 12),
        "model.layers.{layer}.self_attn.v_proj.bias": (6,),
        "model.layers.{layer}.self_attn.o_proj.weight": (12, 18),
        "model.layers.{layer}.self_attn.o_proj.bias": (12,),
        "model.layers.{layer}.post_attention_layernorm.weight": (12,),
        "model.layers.{layer}.mlp.gate_proj.weight": (10, 12),
        "model.layers.{layer}.mlp.gate_proj.bias": (10,),
        "model.layers.{layer}.mlp.up_proj.weight": (10, 12),
        "model.layers.{layer}.mlp.up_proj.bias": (10,),
        "model.layers.{layer}.mlp.down_proj.weight": (12, 10),
        "model.layers.{layer}.mlp.down_proj.bias": (12,),
        "model.norm.weight": (12,),
        "lm_head.weight": (11, 12),
    },
    "original": {
        "emb_dict.weight": (11, 12),
        "trf_blocks.{layer}.norm_1.scale": (12,),
        "trf_blocks.{layer}.att.w_queries.weight": (18, 12),
        "trf_blocks.{layer}.att.w_keys.weight": (6, 12),
        "trf_blocks.{layer}.att.w_values.weight": (6, 12),
        "trf_blocks.{layer}.att.out_proj.weight": (12, 18),
        "trf_blocks.{layer}.att.out_proj.bias": (12,),
        "trf_blocks.{layer}.norm_2.scale": (12,),
        "trf_blocks.{layer}.ffn.lin1.weight": (10, 12),
        "trf_blocks.{layer}.ffn.lin_gate.weight": (10, 12),
        "trf_blocks.{layer}.ffn.lin2.weight": (12, 10),
        "final_ln.scale": (12,),
        "out.weight": (11, 12),
    },
}


def written_out(shapes):
    in_layers = {name: shape for name, shape in shapes.items() if "{layer}" in name}
    layers = {name.format(layer=layer): shape for layer in range(2) for name, shape in in_layers.items()}
    return {name: shape for name, shape in shapes.items() if name not in in_layers} | layers


@pytest.mark.parametrize("layout", SHAPES)
def test_names_and_shapes(layout):
    config = CONFIGS[layout][-1]
    found = to_state_dict(draw_variables(config), config, layout)
    assert {name: array.shape for name, array in found.items()} == written_out(SHAPES[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back(layout, dtype):
    for config in CONFIGS[layout]:
        variables = draw_variables(config, dtype=dtype)
        back = from_state_dict(to_state_dict(variables, config, layout), config, layout)
        assert_equal_trees(back, variables)


def llama_cpp_s_order(weight, heads):
    """Rows of queries or keys as llama.cpp's converter reorders those of transformers."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def test_queries_and_keys_in_gguf_stand_in_llama_cpp_s_order():
    variables = draw_variables(UNTIED)
    hf, gguf = (to_state_dict(variables, UNTIED, layout) for layout in ("hf", "gguf"))
    for part, ours, heads in (("q", "q_proj", 3), ("k", "k_proj", 1)):
        for kind in ("weight", "bias"):
            expected = llama_cpp_s_order(hf[f"model.layers.1.self_attn.{ours}.{kind}"], heads)
            np.testing.assert_array_equal(gguf[f"blk.1.attn_{part}.{kind}"], expected)
    for theirs, ours in (
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_up", "mlp.up_proj"),
    ):
        np.testing.assert_array_equal(gguf[f"blk.1.{theirs}.weight"], hf[f"model.layers.1.{ours}.weight"])
    assert gguf.keys() >= {"token_embd.weight", "output_norm.weight", "output.weight"}


def test_constants_are_passed_over():
    state = to_state_dict(draw_variables(TIED), TIED)
    state |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3) for layer in range(2)}
    from_state_dict(state, TIED)
    state = to_state_dict(draw_variables(ORIGINAL), ORIGINAL, "original")
    from_state_dict(state | {"mask": np.ones((64, 64)), "cos": np.ones((64, 6))}, ORIGINAL, "original")


def test_other_biases_are_zeros_in_the_original():
    """With `attention_bias=True`, as transformers needs them, files of the original load too."""
    config = override(ORIGINAL, attention_bias=True)
    attention = from_state_dict(to_state_dict(draw_variables(ORIGINAL), ORIGINAL, "original"), config, "original")
    attention = attention["params"]["group_0"]["block_0"]["attention"]
    assert attention["out"]["bias"].any()
    assert not any(attention[name]["bias"].any() for name in ("query", "key", "value"))
    message = refused(config_to_hf, ORIGINAL)
    assert "attention_output_bias=True cannot be exported" in message and "with attention_bias=True" in message
    config_to_hf(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_config_from_shapes(layout):
    for config in CONFIGS[layout]:
        state = to_state_dict(draw_variables(config), config, layout)
        given = {"num_attention_heads": 3, "max_position_embeddings": 64}
        if layout == "hf":
            given |= {"rope_parameters": config.rope_parameters, "rms_norm_eps": config.rms_norm_eps}
        assert config_from_state_dict(state, layout, **given) == config
    assert refused(config_from_state_dict, state, layout) == (
        "the shapes of weights do not tell num_attention_heads; give it in the config"
    )
    assert "do not fit" in refused(
        from_state_dict, state, config_from_state_dict(state, layout, **given | {"num_attention_heads": 4}), layout
    )


def test_what_shapes_do_not_tell_and_models_differ_in_is_said():
    state = to_state_dict(draw_variables(CONFIGS["hf"][0]), CONFIGS["hf"][0])
    with pytest.warns(UserWarning, match="taken is 10000 of rope_parameters and 1e-06 of rms_norm_eps; put the"):
        config_from_state_dict(state, num_attention_heads=3)
    given = {"num_attention_heads": 3, "rope_parameters": {"rope_theta": 500_000.0}, "rms_norm_eps": 1e-5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_state_dict(state, **given).rope.rope_theta == 500_000


# config.json.


def hub(**changes):
    """The config.json of meta-llama/Llama-3.2-1B, in the spelling of its time."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    } | changes


def test_files_of_the_hub():
    assert config_from_hf(hub()) == preset("llama3.2-1b")
    new = config_to_hf(preset("llama3.2-1b"))
    assert new["rope_scaling"] == hub()["rope_scaling"] and new["rope_theta"] == hub()["rope_theta"]
    assert config_from_hf(new) == preset("llama3.2-1b")
    # HuggingFaceTB/SmolLM2-135M-Instruct: fields of others, which say nothing here.
    smollm = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
        "initializer_range": 0.041666666666666664, "rope_interleaved": False, "is_llama_config": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    }  # fmt: skip
    assert config_from_hf(smollm) == preset("smollm2-135m")


SMALL = {"model_type": "llama", **SIZES}
FACTORS = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


@pytest.mark.parametrize(
    ("spellings", "rope"),
    [
        ([{}, {"rope_theta": None}, {"rope_scaling": None}, {"rope_parameters": {}}], Rope()),
        (
            [
                {"rope_theta": 500, "rope_scaling": None},
                {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
                {"rope_parameters": {"rope_theta": 500.0}},
                {"rope_parameters": {"rope_type": "default", "rope_theta": 500}},
                {"rope_theta": 500, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
                # Nothing is scaled: transformers passes it over.
                {"rope_theta": 500, "original_max_position_embeddings": 16},
            ],
            Rope(rope_theta=500.0),
        ),
        (
            [
                {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
                {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2}},
                {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
                # To transformers, the longest context is the trained one, whatever is said beside it.
                {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
            ],
            DynamicRope(factor=2.0, original_max_position_embeddings=64),
        ),
        (
            [
                {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
                {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
                {"rope_scaling": {"type": "yarn", "factor": None}, "original_max_position_embeddings": 16},
                {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16, "attention_factor": None}},
            ],
            YarnRope(factor=4.0, original_max_position_embeddings=16),
        ),
        (
            [
                {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 16},
                {"rope_parameters": {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 16}},
            ],
            LongRope(
                short_factor=(1.0,) * 3, long_factor=(2.0,) * 3, factor=4.0, original_max_position_embeddings=16
            ),
        ),
        (
            [
                {
                    "rope_theta": 500.0,
                    "rope_scaling": {
                        "rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4,
                        "original_max_position_embeddings": 16,
                    },
                },
            ],
            Llama3Rope(
                rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    ],
    ids=["nothing", "default", "dynamic", "yarn", "longrope", "llama3"],
)  # fmt: skip
def test_spellings_of_rope(spellings, rope):
    for spelling in spellings:
        assert config_from_hf(SMALL | spelling).rope_parameters == rope, spelling


def test_sizes_may_be_left_out_or_written_out():
    short = config_from_hf({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    explicit = {"head_dim": 16, "num_key_value_heads": 4, "attention_bias": False}
    assert config_from_hf({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, **explicit}) == short
    assert (short.head_width, short.key_value_heads) == (16, 4)
    written = config_to_hf(short)
    assert (written["head_dim"], written["num_key_value_heads"]) == (16, 4)
    # And what was not said goes with the sizes.
    assert (
        override(short, num_attention_heads=2).head_width,
        override(short, num_attention_heads=2).key_value_heads,
    ) == (
        32,
        2,
    )


@pytest.mark.parametrize(("theirs", "ours"), [("swish", "silu"), ("gelu_fast", "gelu_new"), ("gelu", "gelu")])
def test_spellings_of_the_activation(theirs, ours):
    assert config_from_hf(SMALL | {"hidden_act": theirs}).hidden_act == ours


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "llama4"}}, "rope_type='llama4' is unknown"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "keep one of them"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "keep one"),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 1000.0}}, "rope_theta=500.0, and 1000.0 is said"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}, "original_max_position_embeddings": 16},
         "original_max_position_embeddings=16, and 8 is said of it elsewhere; keep one"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object of parameters"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "must be above low_freq_factor=4.0"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "take 3"),
        ({"rope_theta": "10000.0"}, "rope_theta='10000.0' is not a number"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must divide num_attention_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must divide num_attention_heads=3"),
        ({"head_dim": 5}, "head_dim=5 gives heads of 5 features, but RoPE turns pairs"),
        ({"head_dim": None, "hidden_size": 9}, "gives heads of 3 features, but RoPE turns pairs"),
        ({"head_dim": None, "hidden_size": 10}, "num_attention_heads=3 must divide hidden_size=10"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"hidden_act": "prelu"}, "hidden_act='prelu' must be one of"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be positive"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0 must be at least 0 and below 1"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported, only False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
        ({"hidden_size": "12"}, "hidden_size='12' is not of the type int"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, message):
    assert message in refused(config_from_hf, SMALL | changes)


@pytest.mark.parametrize("norm", ["dyt", "layer_norm"])
def test_another_norm_cannot_be_exported(norm, tmp_path):
    config = override(TIED, norm=norm)
    expected = (
        f"norm={norm!r} cannot be exported: transformers' llama does not compute it; keep such a model in our own"
    )
    assert expected in refused(config_to_hf, config)
    lm = LanguageModel(config, build(config), draw_variables(config))
    assert expected in refused(save_hf, lm, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_width_that_transformers_does_not_take_cannot_be_exported():
    config = override(TIED, hidden_size=13)
    assert "hidden_size=13 cannot be exported" in refused(config_to_hf, config)
    with pytest.raises(Exception, match="multiple of the number of attention"):
        transformers.LlamaConfig(hidden_size=13, num_attention_heads=3, head_dim=6)


ROPES = {
    "default": {"rope_theta": 500.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 16},
    "by_parts_ntk": {"factor": 4.0, "ntk_factor": 2.0, "original_max_position_embeddings": 16, "beta": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "truncate": False, "mscale": 1.0},
    "longrope": {**FACTORS, "original_max_position_embeddings": 16},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("rope_type", ROPES)
def test_our_own_format_keeps_rope(rope_type, tmp_path):
    config = override(TIED, norm="dyt", rope_parameters={"rope_type": rope_type, **ROPES[rope_type]})
    lm = LanguageModel(config, build(config), draw_variables(config))
    back = load(save(lm, tmp_path / "saved"))
    assert back.config == config and type(back.config.rope_parameters) is type(config.rope_parameters)
    tokens = np.arange(40)[None] % 11
    np.testing.assert_array_equal(back.logits(tokens), lm.logits(tokens))


def test_a_folder_there_and_back(tmp_path):
    config = dataclasses.replace(UNTIED, rope_parameters={"rope_type": "yarn", **ROPES["yarn"]})
    lm = LanguageModel(config, build(config), draw_variables(config))
    back = load(save_hf(lm, tmp_path / "hf"))
    assert back.config == config
    jax.tree.map(np.testing.assert_array_equal, back.variables, lm.variables)
