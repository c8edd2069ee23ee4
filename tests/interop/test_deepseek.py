"""DeepSeek V3's weights and config.json: experts in two spellings, modules of multi-token prediction, float8, and what
is refused."""

import functools
import json
import math
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
from llmq_jax.interop.float8 import dequantised
from llmq_jax.layers.moe import Experts
from llmq_jax.layers.positions import Rope, YarnRope
from llmq_jax.models import build, override, preset
from llmq_jax.models.deepseek3 import DeepSeekV3Config
from tests.interop.refusals import refused
from tests.parity.references import numpy_state, randomise
from tests.weights import draw_variables

# V 13, D 12, N 3, E 6: no two sizes are equal, and those of experts are multiples of 4, in which torch multiplies.
SIZES = {
    "vocab_size": 13,
    "max_position_embeddings": 64,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 11,
    "intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
PLAIN = DeepSeekV3Config(**SIZES)
AHEAD = override(PLAIN, num_nextn_predict_layers=2)
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
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9))
BIAS = "mlp.gate.e_score_correction_bias"


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


def assert_equal_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


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
    assert found.startswith(f"{tmp_path}: the weights do not fit DeepSeekV3Config: 18 unread (")
    assert found.endswith("; by the shapes of the weights n_routed_experts is 6, not 3")
    edit(tmp_path, n_routed_experts=6, n_group=4)
    found = refused(lq.load, tmp_path)
    assert found == f"{tmp_path / 'config.json'}: DeepSeekV3Config.n_group=4 must divide n_routed_experts=6"
    edit(tmp_path, n_group=3, num_hidden_layers=2)
    message = f"{tmp_path}: the weights do not fit DeepSeekV3Config: 32 unread (model.layers.2.input_layernorm.weight, "
    assert refused(lq.load, tmp_path).startswith(message)


# Files in float8.

WIDE = override(
    AHEAD,
    vocab_size=32,
    hidden_size=160,
    intermediate_size=200,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=130,
    kv_lora_rank=40,
    qk_nope_head_dim=60,
    qk_rope_head_dim=16,
    v_head_dim=70,
    moe_intermediate_size=136,
    num_nextn_predict_layers=1,
)
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
DOWN = "model.layers.0.mlp.down_proj.weight"


def quantised(matrix):
    """(in float8, scale of each block), for the largest number that float8 has: 448."""
    rows, columns = (math.ceil(size / 128) for size in matrix.shape)
    scale = np.empty((rows, columns), np.float32)
    narrow = np.empty(matrix.shape, ml_dtypes.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scale[i, j] = np.abs(matrix[part]).max() / 448
            narrow[part] = (matrix[part] / scale[i, j]).astype(narrow.dtype)
    return narrow, scale


def product(narrow, scale):
    """What they stand for, block by block, in bfloat16."""
    whole = np.empty(narrow.shape, ml_dtypes.bfloat16)
    for i, j in np.ndindex(*scale.shape):
        part = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        whole[part] = (narrow[part].astype(np.float32) * scale[i, j]).astype(whole.dtype)
    return whole


def as_torch(array):
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.tensor(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.tensor(array.astype(np.float32)).to(getattr(torch, array.dtype.name))


def in_linear_layers(name):
    """Of an attention or a feed-forward network: what DeepSeek's files have in float8."""
    return name.endswith("_proj.weight") or "kv_a_proj" in name


def write(folder, tensors, **quantization):
    folder.mkdir()
    save_file({name: as_torch(array) for name, array in tensors.items()}, folder / "model.safetensors")
    config = config_to_hf(WIDE) | {"quantization_config": QUANTIZATION | quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def float8():
    """(the tensors of a file in float8, the same dequantised by hand)."""
    variables = draw_variables(WIDE)
    variables["params"] = jax.tree.map(lambda leaf: 0.1 * leaf, variables["params"])
    file, plain = {}, {}
    for name, array in to_state_dict(variables, WIDE).items():
        if in_linear_layers(name) and "eh_proj" not in name:
            file[name], file[f"{name}_scale_inv"] = quantised(array)
            plain[name] = product(file[name], file[f"{name}_scale_inv"])
        else:
            file[name] = plain[name] = array if name.endswith(BIAS) else array.astype(ml_dtypes.bfloat16)
    return file, plain


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_each_block_is_multiplied_by_its_scale(dtype):
    """Blocks of 2 x 3, of which the last are cut short; the scales need more digits than bfloat16 has."""
    matrix = (np.arange(35).reshape(5, 7) % 8).astype(dtype)
    scale = 1 + np.arange(9, dtype=np.float32).reshape(3, 3) / 1000
    found = dequantised({"w": matrix, "w_scale_inv": scale}, (2, 3))["w"]
    expected = [[float(matrix[i, j]) * scale[i // 2, j // 3] for j in range(7)] for i in range(5)]
    np.testing.assert_array_equal(np.asarray(found), np.array(expected, np.float32).astype(ml_dtypes.bfloat16))
    with pytest.raises(BadInput, match="w is in float8, and its scale w_scale_inv is not there"):
        dequantised({"w": matrix}, (2, 3))


@pytest.mark.exhaustive
def test_a_folder_in_float8(float8, tmp_path):
    file, plain = float8
    assert file[DOWN].shape == (160, 200) and file[f"{DOWN}_scale_inv"].shape == (2, 2)
    lm = lq.load(write(tmp_path / "float8", file))
    assert lm.config == WIDE
    down = lm.params["group_0"]["block_0"]["mlp"]["down"]["kernel"]
    assert down.dtype == jnp.bfloat16
    np.testing.assert_array_equal(down[0], product(file[DOWN], file[f"{DOWN}_scale_inv"]).T)
    expected = from_state_dict(plain, WIDE)
    assert_equal_trees(lm.variables, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.variables["router"])} == {jnp.dtype("float32")}
    dequantised = lm.replace(variables=expected)
    np.testing.assert_array_equal(lm.logits(TOKENS), dequantised.logits(TOKENS))
    np.testing.assert_array_equal(lm.mtp_logits(TOKENS)[0], dequantised.mtp_logits(TOKENS)[0])
    # In another type the rounding to bfloat16 is the same.
    wide = lq.load(tmp_path / "float8", dtype="float32")
    np.testing.assert_array_equal(wide.params["group_0"]["block_0"]["mlp"]["down"]["kernel"], down.astype(jnp.float32))
    # And what is written again is no longer in float8.
    written = lq.save_hf(lm, tmp_path / "again")
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    assert_equal_trees(lq.load(written).variables, expected)


def test_scales_that_do_not_fit_are_refused(float8, tmp_path):
    file, _ = float8
    scale, gate = f"{DOWN}_scale_inv", "model.layers.1.mlp.experts.0.gate_proj.weight"
    folder = write(tmp_path / "shape", file | {scale: file[scale][:1]})
    assert refused(lq.load, folder) == (
        f"{folder}: {scale} is [1, 2]; {DOWN}, [160, 200] in blocks of 128 x 128, takes [2, 2]"
    )
    folder = write(tmp_path / "block", file, weight_block_size=[128, 64])
    assert "in blocks of 128 x 64, takes [" in refused(lq.load, folder)
    folder = write(tmp_path / "vector", file | {"model.norm.weight_scale_inv": np.ones((2, 1), np.float32)})
    assert "model.norm.weight, [160] in blocks of 128 x 128, takes [2]" in refused(lq.load, folder)
    folder = write(tmp_path / "alone", {name: array for name, array in file.items() if name != gate})
    assert refused(lq.load, folder) == f"{folder}: {gate}_scale_inv is the scale of a matrix that is not there"
    folder = write(tmp_path / "unscaled", {name: array for name, array in file.items() if name != scale})
    assert (
        refused(lq.load, folder) == f"{folder}: {DOWN} is in float8, and its scale {scale} is not there; get it again"
    )


@pytest.mark.parametrize("size", [None, 128, [128], [128, 128, 128], [128, 0], [128, 128.0], [True, 128], "128x128"])
def test_sizes_of_blocks_that_are_none(float8, tmp_path, size):
    folder = write(tmp_path / "bad", float8[0], weight_block_size=size)
    message = refused(lq.load, folder)
    assert message.startswith(f"{folder}") and "weight_block_size=" in message
    assert message.endswith(f"={size!r} is not two numbers of rows and columns")


def test_other_quantisations_are_refused():
    message = refused(config_from_hf, hub(quantization_config={"quant_method": "awq", "bits": 4}))
    assert message == "quantization_config={'quant_method': 'awq', 'bits': 4} is not supported, only None"


# config.json.


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
    for config in (PLAIN, CONFIGS["nothing shared"]):
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
