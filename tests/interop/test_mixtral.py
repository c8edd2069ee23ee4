"""Mixtral's weights and config.json: two spellings of experts, there and back, what is refused. Folders of Qwen 3 with
experts, too."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from llmq_jax.interop import config_from_hf, config_from_state_dict, config_to_hf, from_state_dict, to_state_dict
from llmq_jax.interop.architectures import ASSUMED
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.moe import Experts
from llmq_jax.layers.positions import LinearRope, Rope
from llmq_jax.model_files import load
from llmq_jax.models import Gemma2Config, Gemma3Config, GPT2Config, Llama3Config, build, override
from llmq_jax.models.mixtral import MixtralConfig
from llmq_jax.models.qwen import Qwen3MoeConfig
from tests.interop.refusals import refused
from tests.parity.references import numpy_state, randomise
from tests.weights import assert_equal_trees, draw_variables

# V 11, D 12, N 3, K 1, H 6 (not 12 / 3), F 8, E 5: multiples of 4 where torch multiplies by experts.
SIZES = {
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
}
UNTIED = MixtralConfig(**SIZES)
# A dense layer, of the width 8, between two with experts.
QWEN = SIZES | {"num_hidden_layers": 3, "moe_intermediate_size": 4, "norm_topk_prob": True, "mlp_only_layers": [1]}
MODELS = {
    "mixtral": (transformers.MixtralConfig(**SIZES), UNTIED),
    "qwen3_moe": (transformers.Qwen3MoeConfig(**QWEN), Qwen3MoeConfig(**QWEN)),
}
TIED = override(UNTIED, tie_word_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9))


pytestmark = pytest.mark.filterwarnings("error")


def fused(state, config=UNTIED):
    """The same weights with all experts of a layer in one tensor, as newer files have them."""
    state, layers = dict(state), {}
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = (
            [state.pop(f"{old}.experts.{expert}.{name}.weight") for expert in range(config.num_local_experts)]
            for name in ("w1", "w2", "w3")
        )
        layers[f"{new}.gate.weight"] = state.pop(f"{old}.gate.weight")
        layers[f"{new}.experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(w1, w3, strict=True)])
        layers[f"{new}.experts.down_proj"] = np.stack(w2)
    return state | layers


# Weights.


def test_names_and_shapes():
    moe = "model.layers.{layer}.block_sparse_moe"
    in_layers = {
        "model.layers.{layer}.input_layernorm.weight": (12,),
        "model.layers.{layer}.self_attn.q_proj.weight": (18, 12),
        "model.layers.{layer}.self_attn.k_proj.weight": (6, 12),
        "model.layers.{layer}.self_attn.v_proj.weight": (6, 12),
        "model.layers.{layer}.self_attn.o_proj.weight": (12, 18),
        "model.layers.{layer}.post_attention_layernorm.weight": (12,),
        f"{moe}.gate.weight": (5, 12),
    }
    for expert in range(5):
        shapes = {"w1": (8, 12), "w2": (12, 8), "w3": (8, 12)}
        in_layers |= {f"{moe}.experts.{expert}.{name}.weight": shape for name, shape in shapes.items()}
    expected = {"model.embed_tokens.weight": (11, 12)}
    expected |= {name.format(layer=layer): shape for layer in range(2) for name, shape in in_layers.items()}
    expected |= {"model.norm.weight": (12,), "lm_head.weight": (11, 12)}
    found = to_state_dict(draw_variables(UNTIED), UNTIED)
    assert {name: array.shape for name, array in found.items()} == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_there_and_back(config, dtype):
    variables = draw_variables(config, dtype=dtype)
    state = to_state_dict(variables, config)
    for spelling in (state, fused(state)):
        back = from_state_dict(spelling, config)
        assert_equal_trees(back, variables)


def test_where_experts_end_up():
    state = to_state_dict(draw_variables(UNTIED), UNTIED)
    moe = from_state_dict(state, UNTIED)["params"]["group_0"]["block_0"]["moe"]
    for layer, expert in ((0, 0), (1, 4)):
        theirs = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        for name, leaf in (
            ("w1", moe["up_kernel"][layer, expert, :, 0]),
            ("w3", moe["up_kernel"][layer, expert, :, 1]),
            ("w2", moe["down_kernel"][layer, expert]),
        ):
            np.testing.assert_array_equal(state[f"{theirs}.{name}.weight"].T, leaf)


def test_all_that_is_wrong_with_experts_is_named_at_once():
    state = to_state_dict(draw_variables(UNTIED), UNTIED)
    moe = "model.layers.{}.block_sparse_moe"
    w2, w1 = (
        f"{moe.format(layer)}.experts.{expert}.{name}.weight" for layer, expert, name in ((0, 4, "w2"), (1, 0, "w1"))
    )
    state[w1], extra = state[w1].T, f"{moe.format(1)}.experts.5.w1.weight"
    state[extra] = state.pop(w2)
    message = refused(from_state_dict, state, UNTIED)
    assert f"1 missing ({w2})" in message and f"1 unread ({extra})" in message
    assert f"{w1} is [12, 8] instead of [8, 12]" in message


def test_another_number_of_experts_than_the_config_s_is_refused():
    state = to_state_dict(draw_variables(UNTIED), UNTIED)
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    fewer = refused(from_state_dict, state, override(UNTIED, num_local_experts=4))
    assert "6 unread (model.layers.0.block_sparse_moe.experts.4.w1.weight, " in fewer
    assert f"{gate} is [5, 12] instead of [4, 12]" in fewer
    more = refused(from_state_dict, state, override(UNTIED, num_local_experts=6))
    assert "6 missing (model.layers.0.block_sparse_moe.experts.5.w1.weight, " in more
    assert f"{gate} is [5, 12] instead of [6, 12]" in more
    more = refused(from_state_dict, fused(state), override(UNTIED, num_local_experts=6))
    assert "model.layers.0.mlp.experts.gate_up_proj is [5, 16, 12] instead of [6, 16, 12]" in more
    assert "missing" not in more and "unread" not in more


def test_one_file_has_one_spelling():
    state = to_state_dict(draw_variables(UNTIED), UNTIED)
    new = fused(state)
    mixture = {name: tensor for name, tensor in state.items() if "layers.1.block_sparse_moe" not in name}
    mixture |= {name: tensor for name, tensor in new.items() if "layers.1.mlp" in name}
    message = refused(from_state_dict, mixture, UNTIED)
    assert "16 missing (model.layers.1.block_sparse_moe.gate.weight, " in message
    assert "3 unread (model.layers.1.mlp.gate.weight, " in message
    # Nor both.
    message = refused(from_state_dict, state | new, UNTIED)
    assert "6 unread (model.layers.0.mlp.gate.weight, " in message and "missing" not in message


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_the_config_from_shapes(config):
    state = to_state_dict(draw_variables(config), config)
    told = ("num_attention_heads", "num_experts_per_tok", "max_position_embeddings", *ASSUMED)
    given = {name: getattr(config, name) for name in told}
    for spelling in (state, fused(state)):
        assert config_from_state_dict(spelling, **given) == config
        assert refused(config_from_state_dict, spelling) == (
            "the shapes of weights do not tell num_attention_heads and num_experts_per_tok; give it in the config"
        )


# Folders.


@pytest.fixture(scope="module", params=MODELS)
def theirs(request):
    config, _ = MODELS[request.param]
    config.bos_token_id, config.eos_token_id, config.output_router_logits = 0, 0, True
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_a_folder_of_transformers_and_back(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    lm = load(tmp_path / "theirs")
    assert lm.config == MODELS[theirs.config.model_type][1]
    with safe_open(tmp_path / "theirs" / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: array.shape for name, array in to_state_dict(lm.variables, lm.config).items()} == shapes
    np.testing.assert_allclose(lm.logits(TOKENS), logits_of(theirs), rtol=0, atol=1e-4)

    folder = save_hf(lm, tmp_path / "ours")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in numpy_state(theirs).items():
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), tensor)
    np.testing.assert_allclose(logits_of(back), logits_of(theirs), rtol=0, atol=1e-5)
    again = load(folder)
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, again.variables, lm.variables)


def test_a_fused_file(theirs, tmp_path):
    """As transformers writes it with `save_original_format=False`, and made by hand."""
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    lm = load(tmp_path / "theirs")
    np.testing.assert_allclose(lm.logits(TOKENS), logits_of(theirs), rtol=0, atol=1e-4)
    told = {"num_attention_heads", "num_experts_per_tok", "max_position_embeddings", *ASSUMED}
    told |= {"norm_topk_prob", "mlp_only_layers"} & vars(lm.config).keys()
    fields = {name: getattr(lm.config, name) for name in told}
    save_file(theirs.state_dict(), tmp_path / "alone.safetensors")
    alone = load(tmp_path / "alone.safetensors", config=fields)
    assert alone.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, alone.variables, lm.variables)


def test_a_count_of_experts_in_config_json_that_is_not_the_file_s(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 4}))
    name = type(MODELS[theirs.config.model_type][1]).__name__
    found = refused(load, tmp_path)
    sizes = "by the shapes of the weights num_local_experts is 5, not 4"
    assert found.startswith(f"{tmp_path}: {sizes}; the weights do not fit {name}: 6 unread (")


# config.json.


def hub(**changes):
    """The config.json of mistralai/Mixtral-8x7B-v0.1, in the spelling of its time."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    } | changes


def test_a_file_of_the_hub():
    config = config_from_hf(hub())
    assert config == MixtralConfig(max_position_embeddings=32768, router_aux_loss_coef=0.02)
    written = config_to_hf(config)
    assert written.items() >= {"sliding_window": None, "router_jitter_noise": 0.0, "num_local_experts": 8}.items()
    assert not written.keys() & {"attention_bias", "experts"}
    assert config_from_hf(written) == config
    early = config_from_hf(hub(sliding_window=4096))
    assert early.layer_windows == (4096,) * 32 and config_from_hf(config_to_hf(early)) == early


@pytest.mark.parametrize(
    ("spelling", "rope"),
    [
        ({}, Rope(1e6)),
        ({"rope_theta": 500.0, "rope_scaling": None}, Rope(500.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, Rope(500.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, LinearRope(1e6, factor=2.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, LinearRope(1e6, factor=2.0)),
    ],
)
def test_spellings_of_rope(spelling, rope):
    values = {"model_type": "mixtral", **SIZES, **spelling}
    assert config_from_hf(values).rope_parameters == rope
    # The base is what transformers takes too.
    theirs = transformers.MixtralConfig(**SIZES, **spelling)
    assert theirs.rope_parameters["rope_theta"] == rope.rope_theta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported, only 0.0"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok=6 is more than num_local_experts=5"),
        ({"num_local_experts": 0}, "num_local_experts=0 must be at least 1"),
        ({"num_local_experts": "8"}, "num_local_experts='8' is not of the type int"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 must be at least 0"),
        ({"hidden_act": "prelu"}, "hidden_act='prelu' must be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    assert message in refused(config_from_hf, {"model_type": "mixtral", **SIZES, **changes})


def test_biases_of_attention_are_none_of_mixtral_s():
    """transformers passes the field over, and so it says nothing here."""
    with pytest.warns(UserWarning, match="unknown fields are ignored: attention_bias"):
        assert not config_from_hf(hub(attention_bias=True)).attention_bias


@pytest.mark.parametrize(
    "config",
    [
        override(UNTIED, experts={"renormalise": False}),
        override(UNTIED, experts={"dispatch": "capacity", "capacity_factor": 1.0}),
        Llama3Config(experts=Experts()),
        GPT2Config(experts=Experts()),
        Gemma2Config(experts=Experts()),
        Gemma3Config(experts=Experts()),
    ],
    ids=lambda config: config.model_type,
)
def test_experts_of_our_own_cannot_be_exported(config):
    message = refused(config_to_hf, config)
    assert message.startswith("experts=Experts(num_experts=")
    assert f"transformers' {config.model_type} does not compute it; keep such a model in our own format" in message


@pytest.mark.parametrize("config", [config for _, config in MODELS.values()], ids=MODELS)
def test_what_leaves_the_function_of_experts_is_exported(config):
    """How tokens come to their experts, and what keeps the load even in training."""
    written = config_to_hf(config)
    for experts in ({}, {"dispatch": "dense"}, {"balance": None}, {"balance": {"load_balance": 0.5}}):
        assert config_to_hf(override(config, experts=experts)) == written
    dense, variables = override(config, experts={"dispatch": "dense"}), draw_variables(config)
    assert to_state_dict(variables, dense).keys() == to_state_dict(variables, config).keys()


def test_balance_in_transformers_trainer_is_not_switched_on():
    """With the switch in config.json transformers cannot generate from padded prompts."""
    assert not config_to_hf(config_from_hf(hub(output_router_logits=True))).get("output_router_logits", False)
    config = transformers.MixtralConfig(**SIZES, output_router_logits=True)
    model = transformers.MixtralForCausalLM(config).eval()
    tokens = torch.tensor(TOKENS)
    with pytest.raises(RuntimeError, match="must match the size"):
        model.generate(tokens, attention_mask=(tokens.cumsum(1) > tokens[:1, :1]).long(), max_new_tokens=2)


@pytest.mark.parametrize(
    "field", [{"attention_bias": True}, {"attention_output_bias": True}, {"mlp_bias": True}, {"norm": "layer_norm"}]
)
def test_what_transformers_does_not_compute_cannot_be_exported(field, tmp_path):
    config = override(UNTIED, **field)
    assert "cannot be exported: transformers' mixtral" in refused(config_to_hf, config)
    lm = LanguageModel(config, build(config), draw_variables(config))
    assert "cannot be exported" in refused(save_hf, lm, tmp_path / "hf")
