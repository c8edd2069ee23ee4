"""The parts of a parity check: which modules pair, what differs first, names in memory and in files."""

import numpy as np
import pytest
import transformers

from convert.parity_reference import Reference
from convert.parity_trace import Difference, First, Pair, Place, first_difference, pair_modules, rows_difference
from convert.parity_weights import Gradient, first_gradient
from llmq_jax.interop.tables import Placement, out_in, vector

TOLERANCE = 1e-4


def place(path, output, inside=None, parts=()):
    return Place(0, path, "", (), Difference(output, output), inside and Difference(inside, inside), parts)


def test_a_part_counts_where_it_is_seen_from_outside():
    hidden = place(("attention",), 1e-6, parts=(place(("attention", "qkv"), 0.5),))
    assert first_difference([hidden], TOLERANCE) is None
    seen = place(("attention",), 0.3, parts=(place(("attention", "qkv"), 0.5),))
    assert first_difference([hidden, seen], TOLERANCE).place is seen.parts[0]
    alone = place(("mlp",), 0.3, 1e-6, parts=(place(("mlp", "up"), 1e-6),))
    assert first_difference([alone], TOLERANCE) == First(alone, False, (alone,))


def test_what_is_not_a_number_is_a_difference():
    ours, theirs = np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)
    ours[1, 1] = np.nan
    assert rows_difference(ours, theirs).above(1e9)
    assert first_difference([place((), float("nan"))], 1e9) is not None


def test_relative_is_to_the_tokens_own_size():
    theirs = np.array([[1.0, -1.0], [1000.0, 1000.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    for row, relative in ((0, 0.5), (1, 0.0005), (3, 0.5)):
        ours = theirs.copy()
        ours[row, 0] += 0.5
        assert rows_difference(ours, theirs)[:2] == pytest.approx((0.5, relative))


def test_backward_begins_at_the_end():
    def gradient(key, relative):
        return Gradient(key, key, None, Difference(relative, relative))

    gradients = [gradient("embedding", 1e-1), gradient("norm", 1e-2), gradient("head", 1e-7)]
    assert first_gradient(gradients, TOLERANCE).key == "norm"
    assert first_gradient(gradients, 1.0) is None


def test_pairs_follow_from_names_alone():
    """Blocks of two kinds in one pattern, four norms, a mixture of experts that is one module more on one side."""

    def placement(key, path, *slot, transform=vector):
        return Placement(key, ("params", *path.split("/")), slot, transform, False)

    slots = ((("group_0", "block_0"), 0), (("group_0", "block_1"), 0), (("group_0", "block_0"), 1))
    placements = [placement("model.embed.weight", "embedding/table"), placement("model.norm.weight", "norm/scale")]
    for layer, ((group, block), repeat) in enumerate(slots):
        ours, theirs = f"{group}/{block}", f"model.layers.{layer}"
        placements += [
            placement(f"{theirs}.norm_in.weight", f"{ours}/before/scale", repeat),
            placement(f"{theirs}.norm_out.weight", f"{ours}/after/scale", repeat),
            *(placement(f"{theirs}.attn.{name}.weight", f"{ours}/mix/{name}/kernel", repeat) for name in "qkvo"),
        ]
        if block == "block_1":
            placements += [
                placement(f"{theirs}.mlp.experts.{expert}.w.weight", f"{ours}/moe/w/kernel", repeat, expert)
                for expert in range(2)
            ]
    owners = {one.key: one.key for one in placements}
    owners |= {one.key: "model.layers.1.mlp.experts.fused" for one in placements if "experts" in one.key}
    modules = {name.rpartition(".")[0] for name in owners.values()}
    modules |= {"model", "model.layers.0", "model.layers.1", "model.layers.2", "model.layers.1.mlp"}
    modules |= {f"model.layers.{layer}.attn" for layer in range(3)}
    found = {
        (pair.layer, "/".join(pair.path)): pair.theirs for pair in pair_modules(placements, slots, owners, modules)
    }
    expected = {(None, "embedding"): "model.embed", (None, "norm"): "model.norm"}
    for layer in range(3):
        theirs = f"model.layers.{layer}"
        expected |= {
            (layer, ""): theirs,
            (layer, "before"): f"{theirs}.norm_in",
            (layer, "after"): f"{theirs}.norm_out",
        }
        expected |= {(layer, "mix"): f"{theirs}.attn"}
        expected |= {(layer, f"mix/{name}"): f"{theirs}.attn.{name}" for name in "qkvo"}
    expected |= {(1, "moe"): "model.layers.1.mlp", (1, "moe/w"): "model.layers.1.mlp.experts"}
    assert found == expected


def test_names_in_memory_may_differ_from_those_in_files():
    """Mixtral's experts are one tensor a layer in memory, many in a file, and its modules have other names there."""
    config = transformers.MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    layer = "model.layers.0.block_sparse_moe"
    keys = [f"{layer}.gate.weight", f"{layer}.experts.2.w1.weight", f"{layer}.experts.2.w2.weight"]
    reference = Reference.of(model, keys)
    assert [reference.owners[key] for key in keys] == [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    fused = model.model.layers[0].mlp.experts
    np.testing.assert_array_equal(reference.state()[keys[1]], fused.gate_up_proj[2, :20].detach())

    placements = [
        Placement(key, ("params", "group_0", "block_0", "moe", *path), slot, out_in, False)
        for key, path, slot in (
            (keys[0], ("router", "kernel"), (0,)),
            (keys[1], ("experts", "gate"), (0, 2)),
            (keys[2], ("experts", "down"), (0, 2)),
        )
    ]
    pairs = pair_modules(placements, ((("group_0", "block_0"), 0),), reference.owners, reference.modules())
    moe = "model.layers.0.mlp"
    assert Pair(0, ("moe", "experts"), f"{moe}.experts", tuple(keys[1:])) in pairs
    assert Pair(0, ("moe", "router"), f"{moe}.gate", tuple(keys[:1])) in pairs

    tokens = np.arange(24).reshape(2, 12)
    theirs = reference.run(tokens, [f"{moe}.experts", f"{moe}.gate"])
    np.testing.assert_array_equal(theirs.gradients[keys[1]], fused.gate_up_proj.grad[2, :20])
    assert theirs.outputs[f"{moe}.experts"].shape == (24, 16)
    assert theirs.gradients.keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
