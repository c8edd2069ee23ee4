"""Files in float8 with a scale for each block of a matrix, as DeepSeek V3 is published."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.interop import config_to_hf, from_state_dict, to_state_dict
from llmq_jax.interop.float8 import dequantised
from llmq_jax.models import override
from tests.interop.deepseek import AHEAD, BIAS, QUANTIZATION, TOKENS
from tests.interop.refusals import refused
from tests.weights import assert_equal_trees, draw_variables

pytestmark = pytest.mark.filterwarnings("error")

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
    for number in (np.nan, np.inf):
        broken = file[scale].copy()
        broken[-1, 0] = number
        folder = write(tmp_path / f"{number}", file | {scale: broken})
        assert refused(lq.load, folder) == f"{folder}: {scale} holds {number} and must be finite; get it again"
    folder = write(tmp_path / "unscaled", {name: array for name, array in file.items() if name != scale})
    assert (
        refused(lq.load, folder) == f"{folder}: {DOWN} is in float8, and its scale {scale} is not there; get it again"
    )


def test_scales_without_the_config_that_speaks_of_them_are_refused(float8, tmp_path):
    folder = write(tmp_path / "lost", float8[0])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(lq.load, folder)
    assert message.startswith(f"{folder}: holds weights in float8 (model.layers.0.")
    assert message.endswith("_scale_inv), and its config.json has no quantization_config: get config.json again")


@pytest.mark.parametrize("size", [None, 128, [128], [128, 128, 128], [128, 0], [128, 128.0], [True, 128], "128x128"])
def test_sizes_of_blocks_that_are_none(float8, tmp_path, size):
    folder = write(tmp_path / "bad", float8[0], weight_block_size=size)
    message = refused(lq.load, folder)
    assert message.startswith(f"{folder}") and "weight_block_size=" in message
    assert message.endswith(f"={size!r} is not two numbers of rows and columns")
