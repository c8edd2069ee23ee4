"""Gemma's names and config.json, there and back: spellings of layers and RoPE, the text of the multimodal model."""

import json
import shutil
from functools import cache

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmq_jax.interop import config_from_hf, config_from_state_dict, config_to_hf, from_state_dict, to_state_dict
from llmq_jax.interop.architectures import ASSUMED
from llmq_jax.interop.gemma import UNDERIVABLE
from llmq_jax.interop.generation_config import TOKEN_IDS
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.positions import DynamicRope, LinearRope, Rope
from llmq_jax.model_files import load, save
from llmq_jax.models import abstract_variables, build, override, preset
from llmq_jax.models.gemma import GLOBAL, LOCAL, Gemma2Config, Gemma3Config
from tests.interop.refusals import refused
from tests.weights import assert_equal_trees, draw_variables

# V 11, D 12, N 3, K 1, H 6 (not 12 / 3), F 10.
SIZES = {
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "hidden_size": 12,
    "num_hidden_layers": 7,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 10,
    "sliding_window": 5,
    "query_pre_attn_scalar": 8,
}
GEMMA3, GEMMA2 = Gemma3Config(**SIZES), Gemma2Config(**SIZES)
FULL = {"attention_bias": True, "tie_word_embeddings": False}
CONFIGS = (GEMMA3, GEMMA2, Gemma3Config(**SIZES, **FULL), Gemma2Config(**SIZES, **FULL))


pytestmark = pytest.mark.filterwarnings("error")


# Weights.

SHAPES = {
    "model.embed_tokens.weight": (11, 12),
    "model.layers.{layer}.input_layernorm.weight": (12,),
    "model.layers.{layer}.self_attn.q_proj.weight": (18, 12),
    "model.layers.{layer}.self_attn.k_proj.weight": (6, 12),
    "model.layers.{layer}.self_attn.v_proj.weight": (6, 12),
    "model.layers.{layer}.self_attn.o_proj.weight": (12, 18),
    "model.layers.{layer}.post_attention_layernorm.weight": (12,),
    "model.layers.{layer}.pre_feedforward_layernorm.weight": (12,),
    "model.layers.{layer}.mlp.gate_proj.weight": (10, 12),
    "model.layers.{layer}.mlp.up_proj.weight": (10, 12),
    "model.layers.{layer}.mlp.down_proj.weight": (12, 10),
    "model.layers.{layer}.post_feedforward_layernorm.weight": (12,),
    "model.norm.weight": (12,),
}
NORMS = {f"model.layers.{{layer}}.self_attn.{name}_norm.weight": (6,) for name in "qk"}
BIASES = {"q": (18,), "k": (6,), "v": (6,), "o": (12,)}
BIASES = {f"model.layers.{{layer}}.self_attn.{name}_proj.bias": shape for name, shape in BIASES.items()}


def written_out(shapes, layers=7):
    return {name.format(layer=layer): shape for name, shape in shapes.items() for layer in range(layers)}


@cache
def state_of(config):
    return to_state_dict(draw_variables(config), config)


def test_names_and_shapes():
    for config, more in zip(CONFIGS, ({}, {}, BIASES, BIASES), strict=True):
        shapes = SHAPES | more | (NORMS if config.model_type == "gemma3_text" else {})
        shapes |= {} if config.tie_word_embeddings else {"lm_head.weight": (11, 12)}
        found = state_of(config)
        assert {name: array.shape for name, array in found.items()} == written_out(shapes)


@pytest.mark.parametrize(
    ("dtype", "configs"),
    [
        (np.float32, CONFIGS),
        (ml_dtypes.bfloat16, CONFIGS[:1]),
        pytest.param(ml_dtypes.bfloat16, CONFIGS[1:], marks=pytest.mark.exhaustive),
    ],
    ids=["float32", "bfloat16", "bfloat16 of the others"],
)
def test_there_and_back(dtype, configs):
    for config in configs:
        variables = draw_variables(config, dtype=dtype)
        back = from_state_dict(to_state_dict(variables, config), config)
        assert_equal_trees(back, variables)


def test_weights_do_not_depend_on_the_arrangement_of_layers():
    """Layers of any kinds have the same names; our tree groups them by their pattern."""
    state = dict(state_of(GEMMA3))
    other = override(GEMMA3, layer_types=[GLOBAL] + [LOCAL] * 6)
    variables = from_state_dict(state, other)
    assert jax.tree.structure(variables) != jax.tree.structure(abstract_variables(GEMMA3))
    back = to_state_dict(variables, other)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def test_the_config_from_shapes():
    for config in CONFIGS:
        state = state_of(config)
        told = ("num_attention_heads", "sliding_window", "query_pre_attn_scalar", "max_position_embeddings", *ASSUMED)
        assert config_from_state_dict(state, **{name: getattr(config, name) for name in told}) == config
        expected = "do not tell num_attention_heads and sliding_window and query_pre_attn_scalar; give it in the config"
        assert expected in refused(config_from_state_dict, state)


def test_all_that_weights_without_a_config_lack_is_named_at_once(tmp_path):
    save_file(state_of(GEMMA3), tmp_path / "model.safetensors")
    fields = "config={'num_attention_heads': ..., 'sliding_window': ..., 'query_pre_attn_scalar': ...} in Python"
    words = "--config num_attention_heads=... sliding_window=... query_pre_attn_scalar=..."
    message = refused(load, tmp_path)
    assert message.endswith(f"config.json beside them, or pass {fields} or, to convert.from_hf, {words}")


def test_what_does_not_fit_is_named():
    state = dict(state_of(GEMMA3))
    del state["model.layers.2.self_attn.q_norm.weight"]
    assert "1 missing (model.layers.2.self_attn.q_norm.weight)" in refused(from_state_dict, state, GEMMA3)
    state = dict(state_of(GEMMA3))
    assert "14 unread (model.layers.0.self_attn.q_norm.weight, " in refused(from_state_dict, state, GEMMA2)


# config.json.


def hub_1b(**changes):
    """The config.json of google/gemma-3-1b-it, in the spelling of its time."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
        "vocab_size": 262144,
    } | changes


def hub_4b(**changes):
    """The config.json of google/gemma-3-4b-it: what has its default is not said."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    } | changes


def hub_2(**changes):
    """The config.json of google/gemma-2-2b."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "transformers_version": "4.42.4",
        "use_cache": True,
        "vocab_size": 256000,
    } | changes


def test_files_of_the_hub():
    assert config_from_hf(hub_1b()) == preset("gemma3-1b")
    assert config_from_hf(hub_4b()) == preset("gemma3-4b")
    assert config_from_hf(hub_2()) == preset("gemma2-2b")
    # google/gemma-3-270m comes with both spellings of its layers.
    small = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
    kinds = list(preset("gemma3-270m").layer_kinds)
    assert config_from_hf(hub_1b(**small, layer_types=kinds, _sliding_window_pattern=6)) == preset("gemma3-270m")


SMALL = {**SIZES, "model_type": "gemma3_text"}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("spellings", "rope", "local"),
    [
        (
            [
                {},
                {"rope_parameters": None},
                {"rope_theta": None, "rope_local_base_freq": None, "rope_scaling": None},
                {"rope_parameters": {"full_attention": None}},
                {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}},
            ],
            Rope(rope_theta=1e6),
            Rope(),
        ),
        (
            [
                {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 8}, "rope_local_base_freq": 50},
                {
                    "rope_parameters": {
                        "full_attention": {"rope_theta": 500.0, **LINEAR},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                    }
                },
                {
                    "rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": None},
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                    "rope_local_base_freq": 50.0,
                },
            ],
            LinearRope(rope_theta=500.0, factor=8.0),
            Rope(rope_theta=50.0),
        ),
        (
            [
                {
                    "rope_parameters": {
                        "full_attention": {"rope_type": "dynamic", "factor": 2.0},
                        "sliding_attention": LINEAR,
                    }
                }
            ],
            DynamicRope(rope_theta=1e6, factor=2.0, original_max_position_embeddings=64),
            LinearRope(factor=8.0),
        ),
    ],
    ids=["nothing", "linear", "both scaled"],
)
def test_spellings_of_rope(spellings, rope, local):
    for spelling in spellings:
        config = config_from_hf(SMALL | spelling)
        assert (config.rope_parameters, config.local_rope_parameters) == (rope, local), spelling
        assert config_from_hf(config_to_hf(config)) == config


def test_spellings_of_layers():
    pattern = [LOCAL] * 5 + [GLOBAL, LOCAL]
    for spelling in ({}, {"layer_types": None}, {"layer_types": pattern}, {"sliding_window_pattern": 6}):
        assert config_from_hf(SMALL | spelling).layer_types is None
    every_third = config_from_hf(SMALL | {"sliding_window_pattern": 3})
    assert every_third.layer_kinds == (LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL)
    assert config_from_hf(SMALL | {"sliding_window_pattern": 1}).layer_kinds == (GLOBAL,) * 7
    # Kinds that are said count, as in transformers.
    said = {"layer_types": pattern, "sliding_window_pattern": 2}
    assert config_from_hf(SMALL | said).layer_types is None
    theirs = transformers.Gemma3TextConfig(num_hidden_layers=7, sliding_window_pattern=3)
    assert tuple(theirs.layer_types) == every_third.layer_kinds
    assert config_to_hf(every_third)["layer_types"] == theirs.layer_types


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "Gemma3Config.sliding_window=0 must be at least 1"),
        ({"sliding_window": -4}, "Gemma3Config.sliding_window=-4 must be at least 1"),
        ({"sliding_window": None}, "sliding_window=None is not of the type int"),
        ({"sliding_window": 5.5}, "sliding_window=5.5 is not of the type int"),
        ({"layer_types": [LOCAL] * 6}, "has 6 kinds for num_hidden_layers=7"),
        ({"layer_types": [LOCAL] * 6 + ["chunked_attention"]}, "has 'chunked_attention', which is neither"),
        ({"layer_types": LOCAL}, "layer_types='sliding_attention' is not of the type"),
        ({"layer_types": [LOCAL] * 6 + [1]}, "1] is not of the type"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0 is not the distance of two global layers"),
        ({"head_dim": 5}, "head_dim=5 must be even: RoPE turns pairs of features"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must divide num_attention_heads=3"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be at least 1"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0 must be positive and finite, or None"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported, only None"),
        ({"hidden_activation": "prelu"}, "hidden_activation='prelu' must be one of"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0 must be at least 0 and below 1"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported, only False"),
        ({"rope_parameters": {"rope_theta": 500.0}}, "rope_parameters has rope_theta outside of full_attention and"),
        ({"rope_parameters": "linear"}, "rope_parameters='linear' is not an object"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "lacks factor"),
        ({"rope_local_base_freq": 5.0, "rope_parameters": {"sliding_attention": {"rope_theta": 6.0}}}, "keep one"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    assert message in refused(config_from_hf, SMALL | changes)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2"])
def test_a_file_of_global_layers_may_have_no_window(model_type):
    values = {**SMALL, "model_type": model_type, "layer_types": [GLOBAL] * 7, "sliding_window": None}
    config = config_from_hf(values)
    assert config.layer_windows == (None,) * 7
    assert transformers.AutoConfig.for_model(**values).sliding_window is None
    assert config_from_hf(config_to_hf(config)) == config


def test_a_window_longer_than_the_context():
    assert override(GEMMA3, layer_types=[GLOBAL] * 7, sliding_window=4096).sliding_window == 4096
    assert "sliding_window=65 must be at most max_position_embeddings=64" in refused(
        override, GEMMA3, sliding_window=65
    )
    # In a file it stands for one that hides nothing.
    for model_type, model in (("gemma3_text", "Gemma3ForCausalLM"), ("gemma2", "Gemma2ForCausalLM")):
        theirs = transformers.AutoConfig.for_model(model_type, **SIZES | {"sliding_window": 4096})
        config = config_from_hf(theirs.to_dict())
        assert config.sliding_window == 64
        network = getattr(transformers, model)._from_config(theirs, attn_implementation="eager").eval()
        variables = from_state_dict(network.state_dict(), config)
        tokens = np.arange(64)[None] % 11
        with torch.no_grad():
            expected = network(torch.tensor(tokens)).logits.numpy()
        ours = LanguageModel(config, build(config), variables)
        np.testing.assert_allclose(ours.logits(tokens), expected, rtol=0, atol=1e-4)


def test_what_transformers_does_not_compute_cannot_be_exported():
    message = refused(config_to_hf, override(GEMMA3, attn_logit_softcapping=50.0))
    assert "attn_logit_softcapping=50.0 cannot be exported: transformers' gemma3_text" in message
    assert "norm='dyt' cannot be exported" in refused(config_to_hf, override(GEMMA2, norm="dyt"))
    for config in (GEMMA3, GEMMA2):
        assert "hidden_size=13 cannot be exported" in refused(config_to_hf, override(config, hidden_size=13))
    trained = [{"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": n} for n in (16, 32)]
    config = override(GEMMA3, rope_parameters=trained[0], local_rope_parameters=trained[1])
    assert "local_rope_parameters cannot be exported" in refused(config_to_hf, config)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def test_untruncated_yarn_in_gemma_3_is_neither_read_nor_written():
    """transformers looks for `truncate` beside the kinds of layers, so that there it is always true."""
    untruncated = YARN | {"truncate": False}
    for kind in (GLOBAL, LOCAL):
        frequencies = []
        for rope in (YARN, untruncated):
            theirs = transformers.Gemma3TextConfig(**SIZES | {"head_dim": 64}, rope_parameters={kind: dict(rope)})
            frequencies.append(ROPE_INIT_FUNCTIONS["yarn"](theirs, None, layer_type=kind)[0])
        assert torch.equal(*frequencies)
        said = {"rope_parameters": {kind: untruncated}}
        assert "truncate=False is not supported" in refused(config_from_hf, SMALL | said)
    assert "truncate=False is not supported" in refused(config_from_hf, SMALL | {"rope_scaling": untruncated})
    for field in ("rope_parameters", "local_rope_parameters"):
        message = refused(config_to_hf, override(GEMMA3, **{field: untruncated}))
        assert "truncate=False cannot be exported" in message
    assert config_to_hf(override(GEMMA2, rope_parameters=untruncated))["rope_parameters"]["truncate"] is False


@pytest.mark.exhaustive
@pytest.mark.parametrize("base", [GEMMA3, GEMMA2], ids=["gemma 3", "gemma 2"])
def test_folders_there_and_back(base, tmp_path):
    """transformers' format and our own, where layer_types are irregular and rope is scaled."""
    config = override(base, layer_types=[GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL, GLOBAL], rope_parameters=LINEAR)
    lm = LanguageModel(config, build(config), draw_variables(config))
    tokens = np.arange(40)[None] % 11
    for back in (load(save_hf(lm, tmp_path / "hf")), load(save(lm, tmp_path / "own"))):
        assert back.config == config
        np.testing.assert_array_equal(back.logits(tokens), lm.logits(tokens))
    dyt = override(config, norm="dyt")
    lm = LanguageModel(dyt, build(dyt), draw_variables(dyt))
    assert load(save(lm, tmp_path / "dyt")).config == dyt


def test_quantised_weights_of_a_multimodal_model_are_refused():
    values = {"model_type": "gemma3", "text_config": {}, "quantization_config": {"quant_method": "bitsandbytes"}}
    assert "quantization_config=" in refused(config_from_hf, values)


# The multimodal model.


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A folder as transformers writes it, and logits of its text."""
    text = {**SIZES, "num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        logits = model(input_ids=torch.arange(40)[None] % 11).logits.numpy()
    folder = tmp_path_factory.mktemp("gemma3") / "folder"
    model.save_pretrained(folder)
    return folder, logits


def in_memory(names):
    """The names of transformers' model in memory, which files of others have, for those of its files."""
    old = ("language_model.model.", "vision_tower.", "multi_modal_projector.")
    new = ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")
    pairs = list(zip(old, new, strict=True))
    return {name: next(b + name.removeprefix(a) for a, b in pairs if name.startswith(a)) for name in names}


@pytest.mark.parametrize("spelling", ["files", "memory"])
def test_the_text_part_of_a_multimodal_folder(multimodal, spelling, tmp_path):
    folder, logits = multimodal
    state = load_file(folder / "model.safetensors")
    where = "vision_tower, multi_modal_projector"
    if spelling == "memory":
        names = in_memory(state)
        save_file({names[name]: array for name, array in state.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        folder, where = tmp_path, "model.vision_tower, model.multi_modal_projector"
    count = sum(not name.startswith("language_model.") for name in state)
    with pytest.warns(UserWarning) as caught:
        lm = load(folder)
    assert [str(warning.message) for warning in caught] == [f"{count} tensors of other parts are ignored: {where}"]
    assert lm.config.model_type == "gemma3_text"
    np.testing.assert_allclose(lm.logits(np.arange(40)[None] % 11), logits, rtol=0, atol=1e-4)

    # Exported, it is the text model.
    exported = save_hf(lm, tmp_path / "text")
    assert json.loads((exported / "config.json").read_text())["model_type"] == "gemma3_text"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    assert type(theirs).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        found = theirs(input_ids=torch.arange(40)[None] % 11).logits.numpy()
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spelling", ["files", "memory"])
def test_a_multimodal_folder_without_a_config_is_recognised(multimodal, spelling, tmp_path):
    folder, logits = multimodal
    state = load_file(folder / "model.safetensors")
    names = in_memory(state) if spelling == "memory" else {name: name for name in state}
    save_file({names[name]: array for name, array in state.items()}, tmp_path / "model.safetensors")
    assert "do not tell num_attention_heads and sliding_window and query_pre_attn_scalar" in refused(load, tmp_path)
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    untold = (*UNDERIVABLE, *ASSUMED, "local_rope_parameters", "layer_types", "max_position_embeddings")
    fields = {name: getattr(config, name) for name in untold}
    with pytest.warns(UserWarning, match="other parts are ignored"):
        lm = load(tmp_path, config=fields)
    assert lm.config.model_type == "gemma3_text" and lm.config.tie_word_embeddings
    np.testing.assert_allclose(lm.logits(np.arange(40)[None] % 11), logits, rtol=0, atol=1e-4)

    # A head of its own is noticed under its longer name.
    head = "lm_head.weight" if spelling == "memory" else "language_model.lm_head.weight"
    state = load_file(tmp_path / "model.safetensors") | {head: np.ones((11, 12), np.float32)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="other parts are ignored"):
        assert not load(tmp_path, config=fields).config.tie_word_embeddings


@pytest.mark.parametrize(
    "outer", [{}, {"eos_token_id": [3, 4]}, {"eos_token_id": None, "bos_token_id": 5}], ids=["text", "both", "null"]
)
def test_special_tokens_of_a_multimodal_folder(multimodal, outer, tmp_path):
    """Those of the whole model's config, and of its text part's what that does not name."""
    folder, _ = multimodal
    values = json.loads((folder / "config.json").read_text())
    values = {name: value for name, value in values.items() if not name.endswith("_token_id")}
    values["text_config"] |= {"bos_token_id": None, "eos_token_id": [1, 6], "pad_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(values | outer))
    shutil.copy(folder / "model.safetensors", tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path, "config.json", _from_model_config=True)
    with pytest.warns(UserWarning, match="other parts are ignored"):
        found = load(tmp_path).generation
    assert found.token_ids() == {name: getattr(theirs, name) for name in TOKEN_IDS}
    assert found.pad_token_id == 2


def test_a_multimodal_folder_that_lacks_weights_is_refused(multimodal):
    folder, _ = multimodal
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "model.safetensors")
    state = {name: array for name, array in state.items() if name.startswith("language_model.")}
    from_state_dict(state, config)
    for prefix in ("", "model.language_"):
        name = f"{prefix}model.norm.weight"
        twice = state | {name: state["language_model.model.norm.weight"]}
        assert "1 unread (" in refused(from_state_dict, twice, config)
    del state["language_model.model.layers.1.mlp.up_proj.weight"]
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in refused(from_state_dict, state, config)
    assert "text_config='x' is not an object of fields" in refused(config_from_hf, hub_4b(text_config="x"))


def test_an_untied_head_of_the_whole_model_is_the_text_part_s():
    assert config_from_hf(hub_4b()).tie_word_embeddings
    assert not config_from_hf(hub_4b(tie_word_embeddings=False)).tie_word_embeddings
