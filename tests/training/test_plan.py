"""Plans beside what XLA's CPU backend says of the same steps, compiled for 8 virtual devices, never run; and by hand.

A process must ask for devices before JAX starts, hence a program of its own:

    python -m tests.training.test_plan llama3 none:1:data=8 full:2:fsdp=4,tensor=2

The flags by which tests compile quickly change the code of loops and no buffer: the bytes are the same within 1e-5. The
slow cases are compiled as users have them all the same.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.devices import with_devices

if __name__ == "__main__":
    os.environ.update(with_devices(8))

import jax
import jax.numpy as jnp

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import abstract_variables, override
from llmq_jax.objectives.chunks import Chunks
from llmq_jax.training import sharding
from llmq_jax.training.compiled_plan import compile_step
from llmq_jax.training.partitioner import groups, merged, most_rounds
from llmq_jax.training.plan import Run, changes, changes_text, plan, plan_text

GIB = 2**30
ROWS, TOKENS = 16, 128
# Large enough for activations to matter, and each size its own: an array is known by its shape.
SIZES = {"vocab_size": 640, "hidden_size": 128, "num_hidden_layers": 6, "max_position_embeddings": TOKENS}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
LAYERS = ("sliding_attention", "full_attention") * 3
CONFIGS = {
    "gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    "llama3": {"intermediate_size": 384},
    "gemma3": {"intermediate_size": 384, "head_dim": 32, "sliding_window": 64, "layer_types": LAYERS},
    "mixtral": {"intermediate_size": 256},
    "qwen3-moe": {"intermediate_size": 384, "moe_intermediate_size": 192, "head_dim": 32, "mlp_only_layers": (2, 3)},
    # Two layers of each kind: in a stack of one the CPU's compiler undoes remat.
    "deepseek3": {
        **LATENT,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 2,
    },
}
# Every kind of mesh with one architecture, of experts with one that has them; of the others what they keep for the
# backward pass, recomputed and not.
CASES = {
    "gpt2": ("none:1:data=2,fsdp=4", "dots:1:data=2,fsdp=4"),
    "llama3": ("none:1:data=8", "none:1:data=2,fsdp=2,tensor=2", "full:2:data=4,tensor=2"),
    "gemma3": ("none:1:data=2,fsdp=4", "full:1:fsdp=4,tensor=2"),
    "mixtral": ("none:1:data=8", "none:1:data=2,expert=4", "full:1:data=2,fsdp=2,expert=2"),
    "qwen3-moe": ("none:1:expert=2,fsdp=2,tensor=2",),
    "deepseek3": ("none:1:expert=2,fsdp=2,tensor=2", "full:1:data=2,fsdp=2,expert=2"),
}


def run_of(architecture: str, case: str) -> Run:
    from tests.mesh_program import CONFIGS as TINY

    remat, accumulate, mesh, *optimizer = case.split(":")
    config = override(TINY[architecture](), **SIZES, **CONFIGS[architecture])
    options = {"remat": remat, "optimizer": optimizer[0] if optimizer else "adamw"}
    return Run(config, sharding.mesh_sizes(mesh), ROWS, TOKENS, int(accumulate), **options)


def compiled_bytes(run: Run) -> dict:
    """What the compiler says of a device: bytes of arguments, and of all that lives at the peak."""
    with jax.set_mesh(sharding.make_mesh(",".join(f"{axis}={size}" for axis, size in run.sizes.items()))):
        found = compile_step(run)
    return {"arguments": found.held, "peak": found.held + found.beside}


def deviations(architecture: str, *cases: str) -> dict:
    """Of plans from the compiler's words, relative: {case: (of arguments, of the peak)}."""
    command = [sys.executable, "-m", "tests.training.test_plan", architecture, *cases]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    apart = {}
    for line in map(json.loads, done.stdout.splitlines()):
        found = plan(run_of(architecture, line["case"]))
        apart[line["case"]] = found.held.total() / line["arguments"] - 1, found.total / line["peak"] - 1
    assert tuple(apart) == cases
    return apart


def check(architecture: str, *cases: str) -> None:
    for case, (arguments, peak) in deviations(architecture, *cases).items():
        print(f"{architecture:10} {case:32} arguments {arguments:+.2%} peak {peak:+.1%}")
        assert abs(arguments) < 0.01, case
        assert abs(peak) < 0.3, case


def test_a_plan_needs_what_the_compiler_needs():
    check("llama3", "dots:2:data=2,fsdp=4")


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ["llama3", "mixtral"])
def test_a_plan_with_muon_needs_what_the_compiler_needs(architecture):
    check(architecture, "none:1:data=2,fsdp=4:muon", "none:1:data=2,fsdp=2,tensor=2:muon")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CASES)
def test_plans_need_what_the_compiler_needs(architecture):
    check(architecture, *CASES[architecture])


@pytest.fixture(scope="module")
def llama():
    return plan(
        Run(lq.preset("llama3.1-8b"), sharding.mesh_sizes("fsdp=8"), 8, 4096, dtype="bfloat16", attention="masked")
    )


def test_llama_by_hand(llama):
    heads, width, hidden, layers, vocabulary = 32, 4096, 14336, 32, 128256
    layer = width * 128 * (heads + 2 * 8) + heads * 128 * width + 3 * width * hidden
    parameters = layers * layer + 2 * vocabulary * width
    assert parameters == pytest.approx(8.03e9, rel=1e-3)
    assert llama.held["parameters"] == pytest.approx(4 * parameters / 8, rel=1e-3)  # 4.0 GB
    assert llama.held["optimizer's moments"] == pytest.approx(8 * parameters / 8, rel=1e-3)
    assert llama.held["parameters"] / GIB == pytest.approx(3.74, abs=0.01)
    gathered = 2 * layers * layer * 7 / 8  # in bfloat16, once a pass
    head = 4 * vocabulary * width * 7 / 8  # gathered as it is
    assert llama.sent["all-gather of weights, backward", "fsdp"] == pytest.approx(gathered, rel=1e-3)
    assert llama.sent["all-gather of weights, forward", "fsdp"] == pytest.approx(gathered + head, rel=1e-3)
    assert llama.sent["reduce-scatter of gradients", "fsdp"] == pytest.approx(gathered + head, rel=1e-3)
    # Of the embedding's table a device looks its columns up, for the 4,096 tokens of each; and the gradients of these.
    vectors = 2 * 4096 * width * 7 / 8
    assert llama.sent["all-to-all of embeddings", "fsdp"] == pytest.approx(2 * vectors, rel=1e-3)
    # A row of 4,096 tokens. Every layer keeps its input, and what products give: query, key, value, gate, up, `out`,
    # the exponentials of the scores of 32 heads, and in float32 the values that these mix. No matrix's copy is kept.
    kept = llama.parts["backward"]["activations kept for the backward pass"]
    of_token = 2 * (3 * width + 2 * 128 * 8 + 2 * hidden + heads * 4096) + 4 * width
    assert kept == pytest.approx(layers * 4096 * of_token, rel=0.01)
    assert llama.parts["backward"]["weights in lower precision"] < 2**20
    short = plan(replace(llama.run, context=1024))  # fewer rows than hidden units: weights are gathered all the same
    assert short.sent["all-gather of weights, backward", "fsdp"] == pytest.approx(gathered, rel=1e-3)
    assert short.sent["all-gather of activations", "fsdp"] == 4 * 8 * 1024 * 7 / 8  # the ids of tokens, to look up
    full = plan(replace(llama.run, remat="full"))
    kept = full.parts["backward"]["activations kept for the backward pass"]
    assert kept == pytest.approx(2 * layers * 4096 * width, rel=0.05)  # the input of every layer
    # Beside its logits a chunk has a gradient of the head, which is added to the others' in their place.
    of_chunk = llama.parts["loss"]["logits of a chunk"]
    assert of_chunk == pytest.approx(4 * vocabulary * width + 2 * 2**25, rel=0.01)


def test_sums_by_hand():
    config = lq.preset("llama-10m")
    alone = plan(Run(config, sharding.mesh_sizes("data=1"), 8, 32))
    assert not alone.sent
    along = plan(Run(config, sharding.mesh_sizes("data=4"), 8, 32)).sent["all-reduce of gradients", "data"]
    table = 4 * 257 * 384  # read twice, at both ends, and summed for each
    assert along == pytest.approx(2 * (alone.held["parameters"] + table) * 3 / 4, rel=0.001)
    # Of 8 x 32 vectors: two forward and two backward, of query, key and value together, and of gate and up. The
    # vocabulary is odd.
    along = plan(Run(config, sharding.mesh_sizes("tensor=2"), 8, 32)).sent["all-reduce of activations", "tensor"]
    assert along == pytest.approx(2 * (2 + 2) * 6 * 8 * 32 * 384 * 4 / 2, rel=0.001)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_window_as_long_as_it_is_wide_is_none_of_the_weights(dtype):
    sizes = sharding.mesh_sizes("tensor=8")
    square, other = (plan(Run(lq.preset("llama3.2-1b"), sizes, 1, length, dtype=dtype)) for length in (2048, 2040))
    assert square.sent.keys() == other.sent.keys() == {("all-reduce of activations", "tensor")}
    for part, found in square.parts.items():
        for kind, size in found.items():
            assert size == pytest.approx(other.parts[part][kind], rel=0.02, abs=2**24), (part, kind)


def test_deepseek_by_hand():
    found = plan(Run(lq.preset("deepseek-v3"), sharding.mesh_sizes("fsdp=32,tensor=8,expert=8"), 256, 4096))
    layers, experts = 58 + 1, 256 * 3 * 7168 * 2048  # one of them looks a token ahead
    divided = 4 * layers * experts / 2048
    assert divided < found.held["parameters"] < 1.4 * divided  # the rest: attention, dense layers, embeddings
    rows = sharding.layout(abstract_variables(found.run.config)["params"], found.run.sizes)
    assert found.held["parameters"] == sum(row.bytes_per_device for row in rows)
    # 4,096 tokens on a device, 8 experts each, room for all of them at each of 8 devices; there and back, each way.
    room = 4 * 4096 * 8 * 8 * 7168
    assert found.sent["all-to-all of tokens", "expert"] == pytest.approx(4 * layers * room * 7 / 8, rel=1e-3)


def test_micro_batches_keep_less_and_send_more(llama):
    config, sizes = lq.preset("llama-10m"), sharding.mesh_sizes("data=2,fsdp=4")
    once, twice = (plan(Run(config, sizes, 16, 256, accumulate)) for accumulate in (1, 2))
    kept = "activations kept for the backward pass"
    assert twice.parts["backward"][kept] == pytest.approx(once.parts["backward"][kept] / 2, rel=0.05)
    # A device adds up over data the part of a gradient that it keeps; the table's is summed for each of its two ends.
    expected = once.held["parameters"] + 4 * 257 * 384 / 4
    assert once.sent["all-reduce of gradients", "data"] == pytest.approx(expected, rel=0.02)
    for name in (("all-gather of weights, backward", "fsdp"), ("all-reduce of gradients", "data")):
        assert twice.sent[name] == pytest.approx(2 * once.sent[name], rel=0.01)


def test_a_change_that_is_enough(llama):
    memory = 40 * GIB
    (change,) = changes(llama, memory)  # More devices would leave each as many activations.
    assert change.words == "--remat dots" and change.plan.total <= memory < llama.total
    assert f"--remat dots: {change.plan.total / GIB:.2f} GiB" in changes_text(llama, memory)
    text = plan_text(llama, memory)
    assert f"{llama.total / GIB:.2f} GiB on each of 8 devices: does not fit 40 GiB" in text


def test_devices_that_hold_the_same_may_divide_it():
    """With as many rows in all; on more devices with as many on each."""
    given = plan(Run(lq.preset("llama-10m"), sharding.mesh_sizes("data=4"), 4, 64))
    assert [change.words for change in changes(given, given.total - given.least // 3)] == [
        "--mesh data=2,fsdp=2",
        "--batch-size 8 --mesh data=4,fsdp=2 (8 devices)",
    ]


@pytest.mark.exhaustive
def test_no_single_change_is_enough():
    alone = plan(Run(lq.preset("llama-10m"), sharding.mesh_sizes("data=1"), 2, 256))
    assert alone.least == pytest.approx(16 * 9.54e6, rel=0.01)  # masters, moments and gradients
    memory = min(alone.least, alone.total - alone.least) // 2
    (change,) = changes(alone, memory)
    assert "--remat " in change.words and " devices)" in change.words
    assert "--moments " not in change.words  # without which it fits
    assert change.plan.total <= memory


def test_no_change_is_enough(monkeypatch):
    monkeypatch.setattr("llmq_jax.training.plan.GROWTH", (2,))
    options = {"accumulate": 2, "dtype": "bfloat16", "remat": "full", "moments": "bfloat16"}
    least = plan(Run(lq.preset("llama-10m"), sharding.mesh_sizes("data=1"), 2, 256, **options))
    assert "nor all of them on 2 times the devices; choose a shorter --context" in changes_text(least, 1000)


@pytest.mark.parametrize(
    ("mesh", "rows", "context", "why"),
    [
        ("tensor=7", 8, 64, "tensor=7 divides no parameter"),
        ("expert=2", 8, 64, "expert=2 has no effect"),
        ("fsdp=4", 6, 64, "a batch of 6 rows cannot be divided among 4 devices"),
        ("fsdp=4", 8, 512, "a context of 512 exceeds the model's, 256"),
    ],
)
def test_what_cannot_be_planned(mesh, rows, context, why):
    with pytest.raises(BadInput, match=why):
        plan(Run(lq.preset("llama-10m"), sharding.mesh_sizes(mesh), rows, context))


def test_most_rounds_of_the_loop_over_chunks():
    program = jax.make_jaxpr(lambda mask: Chunks.of(mask, 16).run(lambda row: (row.sum(), None), mask))
    (loop,) = (op for op in program(jnp.ones((4, 60))).eqns if op.primitive.name == "while")
    assert most_rounds(loop.params["cond_jaxpr"].jaxpr) == 4 * 60 / 16


def test_dimensions_that_become_others():
    assert groups((16, 128, 4, 32), (2048, 128)) == [(range(2), range(1)), (range(2, 4), range(1, 2))]
    assert groups((2048, 128), (1, 2048, 128)) == [(range(1), range(2)), (range(1, 2), range(2, 3))]
    assert merged([(("data",), ()), (("fsdp",), ("data",)), ((), ("tensor",))], 2) == (("data",), ("tensor",))


if __name__ == "__main__":
    for case in sys.argv[2:]:
        print(json.dumps({"case": case, **compiled_bytes(run_of(sys.argv[1], case))}), flush=True)
