"""Meshes of 8 virtual devices, in processes of their own (`tests.mesh_program`), and what needs no devices."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import MESH_AXES, dimensions, partition_spec, path_names
from llmq_jax.layers.linear import KERNEL
from llmq_jax.models import PRESETS, abstract_variables
from llmq_jax.training import sharding

PMAP = "pmap"
DENSE = ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2")
EXPERTS = ("data=8", "data=2,expert=4", "data=2,fsdp=2,expert=2", "expert=2,fsdp=2,tensor=2")
MESHES = {
    "gpt2": (PMAP, *DENSE),
    "llama3": DENSE,
    "gemma3": (PMAP, *DENSE),
    "mixtral": EXPERTS,
    "deepseek3": EXPERTS,
}


def compared(architecture, meshes):
    """What training on each of these meshes gave beside one device. Losses, gradients and parameters are near."""
    command = [sys.executable, "-m", "tests.mesh_program", architecture, *meshes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    facts = {line["mesh"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert tuple(facts) == tuple(meshes)
    for mesh, found in facts.items():
        assert found["losses"] < 1e-5, mesh  # of 20 steps, relative
        assert found["gradient"] < 1e-5, mesh
        assert found["params"] < 1e-6, mesh
    return facts


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the program keeps to one core")
def test_devices_of_a_cpu_never_wait_for_each_other_for_ever():
    command = [sys.executable, "-m", "tests.exchange_program"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("architecture", MESHES)
def test_every_mesh_trains_as_one_device(architecture):
    for mesh, found in compared(architecture, MESHES[architecture]).items():
        sizes = sharding.mesh_sizes("data=8" if mesh == PMAP else mesh)
        assert found["programs"] == 1, mesh
        assert mesh != PMAP or found["spread"] > 1e-3, "each replica draws its own dropout"
        # Of tokens there and back, and their gradients; of looked-up vectors, and theirs.
        least = 4 * (sizes["expert"] > 1) + 2 * (sizes["fsdp"] > 1)
        assert found["exchanges"] >= least and (found["exchanges"] > 0) == (least > 0), mesh
        if sizes["fsdp"] * sizes["tensor"] > 1:
            assert found["bytes"] < 1.4 / (sizes["fsdp"] * sizes["tensor"]), mesh
        if architecture in ("gpt2", "llama3", "gemma3") and mesh != PMAP:
            assert found["flops"] < 1.6 / 8, mesh  # each device does its share of the products


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ["llama3", "mixtral"])
def test_every_shape_of_mesh_trains_as_one_device(architecture):
    axes = [axis for axis in MESH_AXES if axis != "expert" or MESHES[architecture] is EXPERTS]
    shapes = (sizes for sizes in itertools.product((1, 2, 4, 8), repeat=len(axes)) if math.prod(sizes) == 8)
    # Of two axes the longer one first: the other order divides the same dimensions.
    shapes = (sizes for sizes in shapes if [n for n in sizes if n > 1] != [2, 4])
    texts = (",".join(f"{axis}={n}" for axis, n in zip(axes, sizes, strict=True) if n > 1) for sizes in shapes)
    others = [text for text in texts if text not in MESHES[architecture]]
    compared(architecture, [*others, PMAP] if architecture == "llama3" else others)


@pytest.mark.parametrize(
    "name",
    ["gpt2-124m", "smollm2-135m", "gemma3-1b", "qwen3-0.6b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"],
)
def test_every_parameter_has_its_dimensions(name):
    variables = abstract_variables(PRESETS[name])["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        names = dimensions(path_names(path))
        assert len(names) <= len(leaf.shape), path
        # All that is large is divided by something.
        assert leaf.size < 5e5 * leaf.shape[0] or any(names), path


def test_a_parameter_is_divided_by_what_divides_it():
    sizes = sharding.mesh_sizes("data=2,fsdp=4,tensor=3")
    path = ("group_0", "block_0", "attention", "query", KERNEL)
    assert partition_spec(path, (30, 576, 9, 64), sizes) == P(None, "fsdp", "tensor")
    assert partition_spec(path, (30, 576, 8, 64), sizes) == P(None, "fsdp")
    assert partition_spec(("token_embedding", "embedding"), (50257, 768), sizes) == P(None, "fsdp")
    assert partition_spec(("final_norm", "scale"), (576,), sizes) == P()
    assert partition_spec((*path[:-1], "bias"), (30, 9, 64), sizes) == P(None, "tensor")
    # Of an optimizer, whose moments lie as their parameters do.
    assert partition_spec(("1", "mu", *path), (30, 576, 9, 64), sizes) == P(None, "fsdp", "tensor")
    assert partition_spec(("1", "v_row", *path), (576,), sizes) == P()  # one that keeps rows and columns alone
    assert partition_spec(("group_0", "block_0", "moe", "up_kernel"), (2, 4, 64, 2, 6), sizes) == P(
        None, None, "fsdp", None, "tensor"
    )


def test_a_matrix_that_no_table_lists():
    """As a layer of one's own may have."""
    with pytest.raises(BadInput, match=r"block_0/own/kernel has no named dimensions; give 'own' some in .*\.MODULES"):
        dimensions(("group_0", "block_0", "own", KERNEL))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("data=2,model=4", "unknown axis 'model': here it is tensor"),
        ("data=2,data=4", "data is there twice"),
        ("data", "is no axis with its size; write data=2,fsdp=4"),
        ("data=0", "is no size"),
        ("data=3", "and JAX has 1; sizes multiply to the number of devices; to try it on a CPU, set XLA_FLAGS="),
        ("data=2,tensor=4", "is for 2 x 4 = 8 devices, and JAX has 1"),
    ],
)
def test_meshes_that_cannot_be(text, why):
    with pytest.raises(BadInput, match=why):
        sharding.make_mesh(text, jax.devices()[:1])


def test_an_axis_that_divides_nothing():
    variables = abstract_variables(lq.preset("smollm2-135m"))
    sharding.check_mesh(sharding.mesh_sizes("tensor=3"), variables)
    with pytest.raises(BadInput, match=r"tensor=7 divides no parameter: .*kernel \[30, 576, 3, 64\] has 3 along"):
        sharding.check_mesh(sharding.mesh_sizes("tensor=7"), variables)
    with pytest.raises(BadInput, match=r"fsdp=7 divides no parameter: .* has \d+ along '(embed|latent)'; choose a div"):
        sharding.check_mesh(sharding.mesh_sizes("fsdp=7"), variables)
    with pytest.raises(BadInput, match="expert=2 has no effect"):
        sharding.check_mesh(sharding.mesh_sizes("expert=2"), variables)


def test_rows_that_cannot_be_divided():
    sizes = sharding.mesh_sizes("data=2,fsdp=2,tensor=2")
    sharding.check_rows(12, 3, sizes)
    with pytest.raises(BadInput, match=r"12 rows in 2 parts .* 4 devices \(data=2 x fsdp=2\); choose a multiple of 8"):
        sharding.check_rows(12, 2, sizes)


def test_layout():
    variables = abstract_variables(lq.preset("llama3.2-1b"))
    rows = sharding.layout(variables, sharding.mesh_sizes("fsdp=4,tensor=2"))
    found = {row.name: row for row in rows}["params/group_0/block_0/attention/query/kernel"]
    assert (found.shape, found.axes) == ((16, 2048, 32, 64), ". fsdp tensor .")
    assert found.bytes_per_device == 16 * 2048 * 32 * 64 * 4 // 8
    text = sharding.layout_text(variables, sharding.mesh_sizes("fsdp=4,tensor=2"))
    assert text.splitlines()[-1].startswith("8 devices, 618,143,744 bytes")  # an eighth of all, and whole norms


def test_a_step_can_be_part_of_another_program():
    config = lq.Llama3Config(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    optimizer = lq.training.adamw(1e-3)
    step = lq.training.make_train_step(lq.objectives.NextToken(lq.build(config)), optimizer)
    state = jax.eval_shape(lambda: lq.training.create_state(lq.init(config), optimizer))
    tokens = jax.ShapeDtypeStruct((2, 4), "int32")
    batch = {"tokens": tokens, "targets": tokens, "mask": jax.ShapeDtypeStruct((2, 4), "float32")}
    after, metrics = jax.eval_shape(step, state, batch)
    assert after.step.shape == metrics["loss"].shape == ()


def test_a_model_is_loaded_onto_a_mesh(tmp_path):
    config = lq.GPT2Config(vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    lq.save_hf(lq.LanguageModel(config, lq.build(config), lq.init(config)), tmp_path / "model")
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    for leaf in jax.tree.leaves(lq.load(tmp_path / "model", mesh=mesh).variables):
        assert leaf.sharding.mesh == mesh
    with pytest.raises(BadInput, match="unknown axis 'model'"):
        lq.load(tmp_path / "model", mesh="model=2")
