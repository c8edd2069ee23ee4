"""DeepSeek V3's weights: experts in two spellings, modules of multi-token prediction, and folders of both sides."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.interop import config_from_hf, config_from_state_dict, config_to_hf, from_state_dict, to_state_dict
from llmq_jax.interop.architectures import ASSUMED
from llmq_jax.models import build, override
from tests.interop.deepseek import AHEAD, BIAS, PLAIN, SIZES, TOKENS
from tests.interop.refusals import refused
from tests.parity.references import numpy_state, randomise
from tests.weights import assert_equal_trees, draw_variables

CONFIGS = {
    "plain": PLAIN,
    "modules": AHEAD,
    "tied": override(PLAIN, tie_word_embeddings=True),
    "direct queries": override(PLAIN, q_lora_rank=None, attention_bias=True),
    "experts everywhere": override(AHEAD, first_k_dense_replace=0),
    "dense": override(PLAIN, first_k_dense_replace=3),
    "nothing shared": override(PLAIN, n_shared_experts=0),
}
GIVEN = {
    "num_attention_heads": 3,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "max_position_embeddings": 64,
}
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@functools.cache
def drawn(config):
    """(variables, their state dict), not to be changed."""
    variables = draw_variables(config)
    return variables, to_state_dict(variables, config)


def state_of(config):
    return dict(drawn(config)[1])


def fused(state):
    """The same weights with all experts of a layer in one tensor, as transformers has them in memory."""
    state, parts = dict(state), {}
    for name in [name for name in state if ".mlp.experts." in name]:
        layer, _, rest = name.partition(".mlp.experts.")
        parts.setdefault(f"{layer}.mlp.experts", {})[rest] = state.pop(name)
    for prefix, tensors in parts.items():
        gate, up, down = (
            np.stack([tensors[f"{expert}.{kind}_proj.weight"] for expert in range(len(tensors) // 3)])
            for kind in ("gate", "up", "down")
        )
        state |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    return state


# Weights.


def test_names_and_shapes():
    attention = {
        "input_layernorm.weight": (12,),
        "self_attn.q_a_proj.weight": (10, 12),
        "self_attn.q_a_layernorm.weight": (10,),
        "self_attn.q_b_proj.weight": (27, 10),
        "self_attn.kv_a_proj_with_mqa.weight": (11, 12),
        "self_attn.kv_a_layernorm.weight": (7,),
        "self_attn.kv_b_proj.weight": (48, 7),
        "self_attn.o_proj.weight": (12, 33),
        "post_attention_layernorm.weight": (12,),
    }

    def network(prefix, width):
        shapes = {"gate": (width, 12), "up": (width, 12), "down": (12, width)}
        return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}

    experts = {"mlp.gate.weight": (6, 12), BIAS: (6,)}
    for expert in range(6):
        experts |= network(f"mlp.experts.{expert}", 8)
    experts |= network("mlp.shared_experts", 16)
    before = {"enorm.weight": (12,), "hnorm.weight": (12,), "eh_proj.weight": (12, 24)}
    module = before | attention | experts | {"shared_head.norm.weight": (12,)}
    layers = [attention | network("mlp", 20), attention | experts, attention | experts, module, module]
    expected = {"model.embed_tokens.weight": (13, 12)}
    for number, layer in enumerate(layers):
        expected |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    expected |= {"model.norm.weight": (12,), "lm_head.weight": (13, 12)}
    found = state_of(AHEAD)
    assert {name: array.shape for name, array in found.items()} == expected
    assert list(found) == list(expected)


def test_there_and_back(config):
    variables, state = drawn(config)
    for spelling in (state, fused(state)):
        assert_equal_trees(from_state_dict(spelling, config), variables)


def test_a_gradient_of_the_parameters_alone_has_no_names_of_the_router_s_biases(config):
    variables, state = drawn(config)
    found = to_state_dict(variables["params"], config)
    assert_equal_trees(found, {name: array for name, array in state.items() if not name.endswith("correction_bias")})
    with pytest.raises(BadInput, match=r"1 missing \(params/final_norm/scale\)"):
        to_state_dict({name: leaf for name, leaf in variables["params"].items() if name != "final_norm"}, config)


@pytest.mark.exhaustive
def test_there_and_back_in_half_precision():
    variables = draw_variables(AHEAD, dtype=ml_dtypes.bfloat16)
    assert_equal_trees(from_state_dict(to_state_dict(variables, AHEAD), AHEAD), variables)


def test_where_experts_modules_and_the_router_s_bias_end_up():
    state = state_of(AHEAD)
    variables = from_state_dict(state, AHEAD)
    params, router = variables["params"], variables["router"]
    # Layer 0 is dense; 1 and 2 have experts, 3 and 4 are modules.
    for layer, (group, repeat) in {1: ("group_1", 0), 2: ("group_1", 1), 3: ("mtp", 0), 4: ("mtp", 1)}.items():
        theirs, block = f"model.layers.{layer}", params[group]["block_0"]
        moe = block["moe"]
        for name, leaf in (
            ("mlp.experts.5.gate_proj.weight", moe["up_kernel"][repeat, 5, :, 0]),
            ("mlp.experts.5.up_proj.weight", moe["up_kernel"][repeat, 5, :, 1]),
            ("mlp.experts.5.down_proj.weight", moe["down_kernel"][repeat, 5]),
            ("self_attn.kv_b_proj.weight", block["attention"]["latent_up"]["kernel"][repeat].reshape(7, 48)),
        ):
            np.testing.assert_array_equal(state[f"{theirs}.{name}"].T, leaf)
        np.testing.assert_array_equal(state[f"{theirs}.{BIAS}"], router[group]["block_0"]["moe"]["bias"][repeat])
    np.testing.assert_array_equal(
        state["model.layers.4.eh_proj.weight"].T, params["mtp"]["block_0"]["projection"]["kernel"][1]
    )


def test_the_router_s_bias_keeps_its_type():
    """It moves by a thousandth a step, which bfloat16 could not hold."""
    variables, state = drawn(AHEAD)
    narrow = from_state_dict(state, AHEAD, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow["params"])} == {jnp.dtype("bfloat16")}
    assert_equal_trees(narrow["router"], variables["router"])


def test_all_that_is_wrong_with_experts_is_named_at_once():
    state = state_of(PLAIN)
    moe = "model.layers.{}.mlp"
    lost, turned = f"{moe.format(1)}.experts.4.down_proj.weight", f"{moe.format(2)}.experts.0.up_proj.weight"
    state[turned], extra = state[turned].T, f"{moe.format(0)}.gate.weight"
    state[extra] = state.pop(lost)
    message = refused(from_state_dict, state, PLAIN)
    assert f"1 missing ({lost})" in message and f"1 unread ({extra})" in message
    assert f"{turned} is [12, 8] instead of [8, 12]" in message


@pytest.mark.exhaustive
def test_another_number_of_experts_than_the_config_s_is_refused():
    state, gate = state_of(PLAIN), "model.layers.1.mlp.gate.weight"
    fewer = refused(from_state_dict, state, override(PLAIN, n_routed_experts=3))
    assert "18 unread (model.layers.1.mlp.experts.3.gate_proj.weight, " in fewer
    assert f"{gate} is [6, 12] instead of [3, 12]" in fewer
    more = refused(from_state_dict, state, override(PLAIN, n_routed_experts=9))
    assert "18 missing (model.layers.1.mlp.experts.6.gate_proj.weight, " in more
    assert f"model.layers.2.{BIAS} is [6] instead of [9]" in more
    more = refused(from_state_dict, fused(state), override(PLAIN, n_routed_experts=9))
    assert "model.layers.1.mlp.experts.gate_up_proj is [6, 16, 12] instead of [9, 16, 12]" in more
    shared = refused(from_state_dict, state, override(PLAIN, n_shared_experts=1))
    assert "model.layers.1.mlp.shared_experts.down_proj.weight is [12, 16] instead of [12, 8]" in shared
    dense = refused(from_state_dict, state, override(PLAIN, first_k_dense_replace=2))
    assert "3 missing (model.layers.1.mlp.gate_proj.weight, " in dense and "23 unread (" in dense


def test_one_file_has_one_spelling():
    state = state_of(PLAIN)
    new = fused(state)
    mixture = {name: tensor for name, tensor in state.items() if "layers.2.mlp.experts" not in name}
    mixture |= {name: tensor for name, tensor in new.items() if "layers.2.mlp.experts" in name}
    message = refused(from_state_dict, mixture, PLAIN)
    assert "18 missing (model.layers.2.mlp.experts.0.gate_proj.weight, " in message
    assert "2 unread (model.layers.2.mlp.experts.gate_up_proj, " in message


@pytest.mark.exhaustive
def test_the_config_from_shapes(config):
    state = state_of(config)
    given = GIVEN | {
        name: getattr(config, name)
        for name in ("first_k_dense_replace", "num_nextn_predict_layers", "topk_group", *ASSUMED)
    }
    if config is CONFIGS["dense"]:
        given |= {"n_routed_experts": 6, "moe_intermediate_size": 8, "n_shared_experts": 2}
    if not config.first_k_dense_replace:
        given["intermediate_size"] = 20
    for spelling in (state, fused(state)):
        assert config_from_state_dict(spelling, **given) == config
        assert refused(config_from_state_dict, spelling) == (
            "the shapes of weights do not tell num_attention_heads and num_experts_per_tok and n_group and topk_group "
            "and first_k_dense_replace and num_nextn_predict_layers; give it in the config"
        )


# Modules of multi-token prediction.


def with_copies(state):
    """As DeepSeek's files have them: each module with the embedding and the head of the model."""
    copies = {}
    for layer in (3, 4):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
        copies[f"model.layers.{layer}.shared_head.head.weight"] = state["lm_head.weight"]
    return state | copies


@pytest.mark.exhaustive
def test_copies_of_the_embedding_and_the_head_are_not_read():
    variables, state = drawn(AHEAD)
    assert_equal_trees(from_state_dict(with_copies(state), AHEAD), variables)
    message = refused(from_state_dict, {**state, "model.layers.3.shared_head.bias": np.zeros(12, np.float32)}, AHEAD)
    assert "1 unread (model.layers.3.shared_head.bias)" in message


@pytest.mark.exhaustive
def test_modules_that_the_config_leaves_out():
    variables, state = drawn(AHEAD)
    state = with_copies(state)
    with pytest.warns(UserWarning, match="modules of multi-token prediction are left out: 2"):
        found = from_state_dict(state, PLAIN)
    for collection in found:
        assert_equal_trees(found[collection], {k: v for k, v in variables[collection].items() if k != "mtp"})
    with pytest.warns(UserWarning, match="modules of multi-token prediction are left out: 1"):
        found = from_state_dict(fused(state), override(PLAIN, num_nextn_predict_layers=1))
    first = jax.tree.map(lambda leaf: leaf[:1], variables["params"]["mtp"])
    assert_equal_trees(found["params"]["mtp"], first)


@pytest.mark.exhaustive
def test_modules_that_are_not_there():
    message = refused(from_state_dict, state_of(PLAIN), AHEAD)
    assert message == (
        "num_nextn_predict_layers=2 announces modules of multi-token prediction, of which the weights hold 0; set it "
        'to 0 in config.json, or load them with config={"num_nextn_predict_layers": 0}'
    )
    message = refused(from_state_dict, state_of(override(PLAIN, num_nextn_predict_layers=1)), AHEAD)
    assert message.endswith('or load them with config={"num_nextn_predict_layers": 1}')


# Folders.


@pytest.fixture(scope="module")
def theirs():
    config = transformers.DeepseekV3Config(**SIZES, num_key_value_heads=3, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(path)
    return path


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def edit(folder, **changes):
    """config.json with some fields changed."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_of_transformers_and_back(theirs, folder, tmp_path):
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in load_file(folder / "model.safetensors")
    lm = lq.load(folder)
    assert lm.config == PLAIN
    np.testing.assert_allclose(lm.logits(TOKENS), logits_of(theirs), rtol=0, atol=1e-4)

    written = lq.save_hf(lm, tmp_path / "ours")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in numpy_state(theirs).items():
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), tensor)
    np.testing.assert_allclose(logits_of(back), logits_of(theirs), rtol=0, atol=1e-5)
    again = lq.load(written)
    assert again.config == lm.config
    assert_equal_trees(again.variables, lm.variables)


def test_a_fused_file(theirs, folder, tmp_path):
    """As transformers writes it with `save_original_format=False`, and the state dict as it is in memory."""
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    expected = lq.load(folder).variables
    assert_equal_trees(lq.load(tmp_path / "fused").variables, expected)
    save_file(theirs.state_dict(), tmp_path / "alone.safetensors")
    fields = GIVEN | {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    fields |= {name: getattr(PLAIN, name) for name in ASSUMED}
    alone = lq.load(tmp_path / "alone.safetensors", config=fields)
    assert alone.config == PLAIN
    assert_equal_trees(alone.variables, expected)


@pytest.mark.exhaustive
def test_the_router_s_bias_in_files_of_half_precision(theirs, folder, tmp_path):
    lm = lq.load(folder)
    narrow = lq.load(folder, dtype="bfloat16")
    assert_equal_trees(narrow.variables["router"], lm.variables["router"])
    for source, dtype in ((lm, "bfloat16"), (narrow, None)):
        written = lq.save_hf(source, tmp_path / str(dtype), dtype=dtype)
        tensors = load_file(written / "model.safetensors")
        for name, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if name.endswith(BIAS) else torch.bfloat16), name
            if name.endswith(BIAS):
                np.testing.assert_array_equal(tensor.numpy(), theirs.state_dict()[name].numpy())
        assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"
        assert_equal_trees(lq.load(written).variables, narrow.variables)


def test_a_config_that_announces_modules_which_the_folder_lacks(theirs, tmp_path):
    """transformers' own files are such: it announces one by default, and saves none. They are left out, and no config
    announces them any longer; where some of a module is there, or where they are asked for, that is an error."""
    config = transformers.DeepseekV3Config.from_dict({**theirs.config.to_dict(), "num_nextn_predict_layers": 1})
    model = transformers.DeepseekV3ForCausalLM(config)
    model.load_state_dict(theirs.state_dict())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.warns(UserWarning) as caught:
        lm = lq.load(tmp_path)
    (warning,) = caught
    assert str(warning.message) == (
        "num_nextn_predict_layers=1 announces what the weights hold nothing of: transformers does not save it; loaded "
        "with num_nextn_predict_layers=0"
    )
    assert lm.config == PLAIN
    np.testing.assert_allclose(lm.logits(TOKENS), logits_of(theirs), atol=1e-4)
    with warnings.catch_warnings(action="error"):
        assert lq.load(tmp_path, config={"num_nextn_predict_layers": 0}).config == PLAIN
    message = refused(lq.load, tmp_path, config={"num_nextn_predict_layers": 1})
    assert message.startswith(f"{tmp_path}: num_nextn_predict_layers=1 announces modules")
    assert message.endswith('load them with config={"num_nextn_predict_layers": 0}')

    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"model.layers.3.eh_proj.weight": torch.zeros(16, 32)}, tmp_path / "model.safetensors")
    assert "announces modules of multi-token prediction, of which the weights hold 0" in refused(lq.load, tmp_path)


def test_null_in_its_config_is_what_transformers_takes_for_it():
    """A switch that is null is off, though it is on where the field is absent."""
    nulls = dict.fromkeys(("attention_dropout", "norm_topk_prob", "num_nextn_predict_layers", "rope_interleave"))
    values = config_to_hf(PLAIN) | nulls
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**values)).eval()
    randomise(model)
    config = config_from_hf(values)
    assert config == override(PLAIN, norm_topk_prob=False, rope_interleave=False)
    lm = lq.LanguageModel(config, build(config), from_state_dict(numpy_state(model), config))
    np.testing.assert_allclose(lm.logits(TOKENS), logits_of(model), atol=1e-4)


def test_no_shared_experts_in_a_folder_of_transformers(tmp_path):
    """It has matrices of theirs all the same, without any number in them."""
    values = config_to_hf(override(PLAIN, n_shared_experts=0))
    with warnings.catch_warnings(action="ignore"):  # torch's, of nothing to initialise
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**values)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes["model.layers.1.mlp.shared_experts.up_proj.weight"] == [0, 12]
    np.testing.assert_allclose(lq.load(tmp_path).logits(TOKENS), logits_of(model), atol=1e-4)


@pytest.mark.exhaustive
def test_a_folder_with_modules_and_back(tmp_path):
    variables, _ = drawn(AHEAD)
    lm = lq.LanguageModel(AHEAD, build(AHEAD), variables)
    written = lq.save_hf(lm, tmp_path / "ours")
    assert json.loads((written / "config.json").read_text())["num_nextn_predict_layers"] == 2
    again = lq.load(written)
    assert again.config == AHEAD
    assert_equal_trees(again.variables, variables)
    for found, expected in zip(again.mtp_logits(TOKENS), lm.mtp_logits(TOKENS), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.warns(UserWarning, match="left out: 2"):
        plain = lq.load(written, config={"num_nextn_predict_layers": 0})
    np.testing.assert_array_equal(plain.logits(TOKENS), lm.logits(TOKENS))


def test_transformers_reads_our_modules(tmp_path, monkeypatch):
    """What it drafts with reads the same folder, and the model alone leaves them out. Which layers are modules it knows
    of models with 61 layers only, and is told here."""
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\."]
    )
    written = lq.save_hf(lq.LanguageModel(AHEAD, build(AHEAD), drawn(AHEAD)[0]), tmp_path / "ours")
    with warnings.catch_warnings(action="ignore"):
        main, info = transformers.AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
        modules = MtpModel.from_pretrained(main)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected, found = fused(state_of(AHEAD)), modules.layers.state_dict()
    assert len(found) == 2 * 20
    for name, tensor in found.items():
        depth, _, rest = name.partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        np.testing.assert_array_equal(tensor.numpy(), expected[f"model.layers.{3 + int(depth)}.{rest}"])


def test_counts_in_config_json_that_are_not_the_file_s(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, n_routed_experts=3)
    found = refused(lq.load, tmp_path)
    sizes = "by the shapes of the weights n_routed_experts is 6, not 3"
    assert found.startswith(f"{tmp_path}: {sizes}; the weights do not fit DeepSeekV3Config: 18 unread (")
    edit(tmp_path, n_routed_experts=6, n_group=4)
    found = refused(lq.load, tmp_path)
    assert found == f"{tmp_path / 'config.json'}: DeepSeekV3Config.n_group=4 must divide n_routed_experts=6"
    edit(tmp_path, n_group=3, num_hidden_layers=2)
    message = f"{tmp_path}: the weights do not fit DeepSeekV3Config: 32 unread (model.layers.2.input_layernorm.weight, "
    assert refused(lq.load, tmp_path).startswith(message)
