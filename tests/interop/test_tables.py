"""The strict machinery of weight tables, on GPT-2's table."""

import dataclasses
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from llmq_jax.errors import BadInput
from llmq_jax.interop import from_state_dict, to_state_dict
from llmq_jax.interop.architectures import weight_table
from llmq_jax.interop.tables import KEEP, LazyTensor
from llmq_jax.models.gpt2 import GPT2Config
from tests.devices import with_devices
from tests.interop.refusals import refused

SIZES = {"vocab_size": 11, "max_position_embeddings": 7, "hidden_size": 6}
TIED = GPT2Config(**SIZES, num_hidden_layers=2, num_attention_heads=3, intermediate_size=5)
UNTIED = GPT2Config(**SIZES, num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=False)

BLOCK = {
    "ln_1.weight": (6,),
    "ln_1.bias": (6,),
    "attn.c_attn.weight": (6, 18),
    "attn.c_attn.bias": (18,),
    "attn.c_proj.weight": (6, 6),
    "attn.c_proj.bias": (6,),
    "ln_2.weight": (6,),
    "ln_2.bias": (6,),
    "mlp.c_fc.weight": (6, None),
    "mlp.c_fc.bias": (None,),
    "mlp.c_proj.weight": (None, 6),
    "mlp.c_proj.bias": (6,),
}


def make_state(config, dtype=np.float32):
    """A state dict as transformers would save it, every element different."""
    shapes = {"transformer.wte.weight": (11, 6), "transformer.wpe.weight": (7, 6)}
    for layer in range(config.num_hidden_layers):
        for name, shape in BLOCK.items():
            shapes[f"transformer.h.{layer}.{name}"] = tuple(n or config.mlp_width for n in shape)
    shapes |= {"transformer.ln_f.weight": (6,), "transformer.ln_f.bias": (6,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (11, 6)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].shape == right[name].shape, name
        assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name


@pytest.mark.parametrize("config", [TIED, UNTIED])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_bit_exact_and_in_order(config, dtype):
    state = make_state(config, dtype)
    assert_same(to_state_dict(from_state_dict(state, config), config), state)


def test_where_tensors_end_up():
    state = make_state(UNTIED)
    params = from_state_dict(state, UNTIED)["params"]
    block = params["group_0"]["block_0"]
    for layer in range(3):
        c_attn = state[f"transformer.h.{layer}.attn.c_attn.weight"]
        kernel = block["attention"]["qkv"]["kernel"][layer]
        assert kernel.shape == (6, 3, 2, 3)  # in; query, key, value; heads; head width
        for part, theirs in enumerate(np.split(c_attn, 3, axis=1)):
            np.testing.assert_array_equal(kernel[:, part].reshape(6, 6), theirs)
        down = block["mlp"]["down"]["kernel"][layer]
        np.testing.assert_array_equal(down, state[f"transformer.h.{layer}.mlp.c_proj.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], state["lm_head.weight"].T)


def test_names_without_the_prefix_and_mask_buffers():
    """The file of the original GPT-2 on the hub."""
    state = make_state(TIED)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 7, 7), np.float32))
        bare[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    assert_same(to_state_dict(from_state_dict(bare, TIED), TIED), state)


def test_all_that_is_wrong_is_named_at_once():
    state = make_state(TIED)
    del state["transformer.h.1.ln_2.bias"], state["transformer.ln_f.weight"]
    state["transformer.h.0.attn.c_attn.weight"] = state["transformer.h.0.attn.c_attn.weight"].T
    state["transformer.wpe.weight"] = np.zeros((7, 6), np.int32)
    state["transformer.h.2.ln_1.bias"] = np.zeros(6, np.float32)
    state["score.weight"] = np.zeros((2, 6), np.float32)
    message = refused(from_state_dict, state, TIED)
    assert "2 missing (transformer.h.1.ln_2.bias, transformer.ln_f.weight)" in message
    assert "2 unread (transformer.h.2.ln_1.bias, score.weight)" in message
    assert "transformer.h.0.attn.c_attn.weight is [18, 6] instead of [6, 18]" in message
    assert "transformer.wpe.weight has the type int32" in message


def test_all_that_is_missing_is_named_and_only_very_long_lists_are_shortened():
    message = refused(from_state_dict, {}, TIED)
    assert "28 missing (transformer.wte.weight," in message
    assert message.count("transformer.h.0.") == message.count("transformer.h.1.") == 12
    deep = refused(from_state_dict, {}, replace(TIED, num_hidden_layers=20))
    assert "244 missing" in deep and "and 44 more)" in deep


def test_more_tensors_than_there_can_be_are_refused():
    table, count = weight_table("gpt2"), len(make_state(TIED))
    assert len(table.placements(TIED, most=count)) == count
    message = refused(table.placements, TIED, most=count - 1)
    assert message == f"GPT2Config has more than {count - 1} tensors, far more than there are"


def test_a_tensor_under_both_names_is_refused():
    state = make_state(TIED)
    state["ln_f.bias"] = state["transformer.ln_f.bias"]
    assert "1 there twice, with and without a prefix (ln_f.bias)" in refused(from_state_dict, state, TIED)


def test_a_tied_head_may_repeat_the_embedding_and_nothing_else():
    state = make_state(TIED)
    repeated = state | {"lm_head.weight": state["transformer.wte.weight"].copy()}
    assert_same(to_state_dict(from_state_dict(repeated, TIED), TIED), state)
    repeated["lm_head.weight"][3, 2] += 1
    message = refused(from_state_dict, repeated, TIED)
    assert "lm_head.weight differs from transformer.wte.weight although tie_word_embeddings is true" in message


def test_an_untied_head_must_be_there():
    state = make_state(UNTIED)
    del state["lm_head.weight"]
    assert "1 missing (lm_head.weight)" in refused(from_state_dict, state, UNTIED)


def test_types():
    state = make_state(TIED, ml_dtypes.bfloat16)
    assert from_state_dict(state, TIED, dtype=np.float32)["params"]["final_norm"]["scale"].dtype == np.float32
    # Of a stacked leaf whose layers differ, the type holds both.
    state["transformer.h.1.mlp.c_fc.bias"] = state["transformer.h.1.mlp.c_fc.bias"].astype(np.float32)
    params = from_state_dict(state, TIED)["params"]
    assert params["group_0"]["block_0"]["mlp"]["up"]["bias"].dtype == np.float32
    assert params["group_0"]["block_0"]["mlp"]["up"]["kernel"].dtype == ml_dtypes.bfloat16


def test_torch_tensors_are_read_too():
    state = make_state(TIED)
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    assert_same(to_state_dict(from_state_dict(tensors, TIED), TIED), state)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].bfloat16()
    assert "transformer.ln_f.bias cannot be read as a numpy array" in refused(from_state_dict, tensors, TIED)


def test_every_tensor_is_read_once_and_only_when_all_fits():
    reads = []

    def lazy(name, array):
        return LazyTensor(array.shape, array.dtype, lambda: reads.append(name) or array)

    state = make_state(TIED)
    tensors = {name: lazy(name, array) for name, array in state.items()}
    refused(from_state_dict, {name: tensor for name, tensor in tensors.items() if "ln_f" not in name}, TIED)
    assert reads == []
    from_state_dict(tensors, TIED)
    assert sorted(reads) == sorted(state)


def test_export_makes_tensors_when_asked():
    variables = from_state_dict(make_state(TIED), TIED)
    tensors = weight_table("gpt2").lazy_state_dict(variables, TIED, ml_dtypes.bfloat16)
    tensor = tensors["transformer.h.1.attn.c_attn.weight"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((6, 18), ml_dtypes.bfloat16, 216)
    assert np.asarray(tensor).dtype == ml_dtypes.bfloat16


def test_what_export_returns_is_the_caller_s():
    variables = from_state_dict(make_state(TIED), TIED)
    exported = to_state_dict(variables, TIED)
    exported["transformer.wte.weight"][:] = 0
    assert np.asarray(variables["params"]["token_embedding"]["embedding"]).any()


def test_variables_that_do_not_fit_are_refused():
    variables = from_state_dict(make_state(TIED), TIED)
    adapters = {"group_0": {"block_0": {"attention": {"qkv": {"a": np.zeros((2, 6, 4))}}}}}
    for tree, changes, expected in (
        (
            variables,
            {"vocab_size": 12},
            "of another shape (params/token_embedding/embedding is [11, 6] instead of [12, 6])",
        ),
        (variables, {"tie_word_embeddings": False}, "1 missing (params/lm_head/kernel)"),
        (variables["params"], {"tie_word_embeddings": False}, "1 missing (params/lm_head/kernel)"),  # as a gradient is
        (
            {**variables, "lora": adapters},
            {},
            "1 without a place in this layout (lora/group_0/block_0/attention/qkv/a)",
        ),
    ):
        message = refused(to_state_dict, tree, dataclasses.replace(TIED, **changes))
        assert expected in message and KEEP not in message


def test_unknown_layout():
    with pytest.raises(BadInput, match="gpt2 has no layout 'huggingface'; it has hf"):
        from_state_dict({}, TIED, layout="huggingface")


ON_DEVICES = """
import jax
import numpy as np
from llmq_jax.interop.architectures import weight_table
from llmq_jax.training.sharding import make_mesh, place
from tests.models.test_heads import CONFIGS
from tests.weights import draw_variables
config = CONFIGS["mixtral"]
variables, table = draw_variables(config), weight_table("mixtral")
with jax.set_mesh(make_mesh("fsdp=2,expert=2")):
    placed = place(variables)
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
expected, found = (table.lazy_state_dict(each, config) for each in (variables, placed))
for key, tensor in found.items():
    np.testing.assert_array_equal(np.asarray(tensor), np.asarray(expected[key]), err_msg=key)
kept = [leaf.shape for leaf in jax.tree.leaves(placed) if leaf._npy_value is not None]
assert not kept, kept
"""


def test_an_export_leaves_no_copy_of_the_weights_on_the_host():
    """JAX keeps what it has copied from other devices, as long as the array."""
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], env=with_devices(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
