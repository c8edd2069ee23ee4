"""Experts in the training step: balance losses, the bias that moves, the load that is reported; and its plots."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.layers.expert_balance import Balance, all_layers, balance_losses, max_violation, moved_bias
from llmq_jax.layers.moe import Experts
from llmq_jax.models import Llama3Config, build, init, preset
from llmq_jax.objectives import NextToken
from llmq_jax.training.checkpoints import config_dict
from llmq_jax.training.expert_plots import draw_expert_load, mean_load, plot_balance, plot_expert_load, plot_experts
from llmq_jax.training.run_config import CONFIG as CONFIG_FILE
from llmq_jax.training.run_config import MARK
from llmq_jax.training.state import create_state
from llmq_jax.training.step import make_eval_step, make_train_step

BALANCE = Balance(load_balance=0.3, router_z=0.1, sequence=0.2, device=0.1, devices=2, bias_rate=0.01)
EXPERTS = Experts(4, 2, first_layer=1, selection_bias=True, balance=BALANCE)
CONFIG = Llama3Config(
    vocab_size=23,
    max_position_embeddings=16,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=12,
    initializer_range=0.3,
    experts=EXPERTS,
)
SGD = optax.sgd(0.1)


def batch(rows=4, length=9):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 23, (rows, length + 1)).astype(np.int32)
    segments = (np.arange(length)[None] < rng.integers(3, length + 1, rows)[:, None]).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": segments.astype(np.float32),
        "segment_ids": segments,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


@cache
def drawn(config):
    return jax.device_get(init(config))


@cache
def train_step(config, accumulate):
    return make_train_step(NextToken(build(config)), SGD, accumulate=accumulate)


@cache
def train(config, accumulate=1, steps=1):
    step = train_step(config, accumulate)
    state = create_state(jax.tree.map(jnp.array, drawn(config)), SGD)  # a copy, which the first step consumes
    for _ in range(steps):
        state, metrics = step(state, batch())
    return state, metrics


def test_the_loss_is_that_of_tokens_and_the_terms_with_their_coefficients():
    _, metrics = train(CONFIG)
    added = sum(
        getattr(BALANCE, name) * metrics[f"{name}_loss"] for name in ("load_balance", "router_z", "sequence", "device")
    )
    np.testing.assert_allclose(metrics["loss"], metrics["next_token_loss"] + added, rtol=1e-6)
    model, variables = build(CONFIG), drawn(CONFIG)
    inputs = {name: batch()[name] for name in ("tokens", "positions", "segment_ids")}

    @jax.jit
    def reported(variables):
        reports = all_layers(model.apply(variables, **inputs, method="forward").counts)
        return reports, balance_losses(reports, BALANCE, 2)

    reports, losses = reported(variables)
    for name, loss in losses.items():
        np.testing.assert_allclose(metrics[f"{name}_loss"], loss, rtol=1e-5)
    np.testing.assert_array_equal(metrics["expert_load"], reports.assigned)
    assert metrics["expert_load"].shape == (2, 4)
    assert metrics["expert_load"].sum() == 2 * 2 * batch()["segment_ids"].sum()  # layers · top-k · real tokens
    np.testing.assert_allclose(metrics["max_violation"], max_violation(reports.assigned).mean(), rtol=1e-6)


def test_evaluation_leaves_the_terms_and_the_bias_alone():
    variables, objective = jax.tree.map(jnp.array, drawn(CONFIG)), NextToken(build(CONFIG))
    sums, weights = make_eval_step(objective)(variables, batch())
    np.testing.assert_allclose(sums["loss"] / weights["loss"], train(CONFIG)[1]["next_token_loss"], rtol=1e-6)


def test_the_bias_moves_by_the_load_of_all_micro_batches_and_by_no_gradient():
    state, metrics = train(CONFIG)
    expected = moved_bias(jnp.zeros((2, 4)), metrics["expert_load"], BALANCE)
    (bias,) = jax.tree.leaves(state.variables["router"])
    np.testing.assert_allclose(bias, expected)
    assert np.abs(bias).max() == pytest.approx(0.01)
    parts, part_metrics = train(CONFIG, accumulate=2)
    np.testing.assert_array_equal(part_metrics["expert_load"], metrics["expert_load"])
    np.testing.assert_array_equal(jax.tree.leaves(parts.variables["router"])[0], bias)
    assert part_metrics["max_violation_batch"] > metrics["max_violation_batch"]  # of fewer tokens
    np.testing.assert_allclose(part_metrics["next_token_loss"], metrics["next_token_loss"], rtol=1e-5)
    twice, _ = train(CONFIG, steps=2)
    assert np.abs(jax.tree.leaves(twice.variables["router"])[0]).max() > 0.01


def test_a_bias_that_came_in_half_precision_moves_in_float32():
    """Some files of DeepSeek's kind hold it so. Were its type another after a step, no checkpoint would fit the state
    that a run begins with, and none could be resumed."""
    variables = {**drawn(CONFIG), "router": jax.tree.map(lambda leaf: leaf.astype("bfloat16"), drawn(CONFIG)["router"])}
    state = create_state(variables, SGD)
    for _ in range(2):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.variables)} == {"float32"}
        state, _ = train_step(CONFIG, 1)(state, batch())


def test_without_a_rate_the_bias_stays():
    still = dataclasses.replace(CONFIG, experts=dataclasses.replace(EXPERTS, balance=None))
    state, metrics = train(still)
    assert not np.any(jax.tree.leaves(state.variables["router"])[0])
    np.testing.assert_allclose(metrics["loss"], metrics["next_token_loss"])


def test_what_was_dropped_is_reported():
    slots = dataclasses.replace(EXPERTS, dispatch="capacity", capacity_factor=0.5)
    _, metrics = train(dataclasses.replace(CONFIG, experts=slots))
    assert 0.0 < metrics["dropped"] < 1.0


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{"remat": "full"}, {"scan_layers": False}], ids=str)
def test_remat_and_written_out_layers_give_the_same(options):
    step = make_train_step(NextToken(build(CONFIG, **options)), SGD)
    state, metrics = step(create_state(init(CONFIG), SGD), batch())
    expected, expected_metrics = train(CONFIG)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.variables, expected.variables)


def run_folder(folder, loads):
    folder.mkdir()
    records = [
        {"step": step, "tokens": step, "loss": 1.0, "max_violation": 0.5, "expert_load": load}
        for step, load in enumerate(loads, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_plots(tmp_path):
    loads = [[[9, 1, 1, 1]] * 2] * 8 + [[[2, 2, 2, 2], [4, 2, 1, 1]]] * 2
    folder = run_folder(tmp_path / "run", loads)
    np.testing.assert_allclose(mean_load([{"expert_load": load} for load in loads]), [[1, 1, 1, 1], [2, 1, 0.5, 0.5]])
    paths = plot_experts(folder)
    assert [path.name for path in paths] == ["expert-load.png", "balance.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    other = run_folder(tmp_path / "other", [[[1, 1, 1, 1]]])
    assert plot_expert_load([folder, other], tmp_path / "both.png").stat().st_size > 5000
    assert plot_balance([folder, other], tmp_path / "balance.png").stat().st_size > 5000
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 1.0}\n')
    assert plot_experts(dense) == []
    with pytest.raises(BadInput, match="dense has no expert_load"):
        plot_expert_load([dense], tmp_path / "x.png")
    with pytest.raises(BadInput, match="dense has no max_violation"):
        plot_balance([dense], tmp_path / "x.png")


DEEPSEEK = preset("deepseek-10m", num_hidden_layers=4, first_k_dense_replace=2, num_nextn_predict_layers=2)


@pytest.mark.parametrize(
    ("config", "rows", "names"),
    [
        (DEEPSEEK, 4, ["2", "3", "mtp 1", "mtp 2"]),
        (DEEPSEEK, 2, ["2", "3"]),  # a recipe that leaves the modules out
        (dataclasses.replace(CONFIG, experts=Experts(4, 2, dense_layers=[1])), 2, ["0", "2"]),
        (preset("mixtral-10m"), 4, ["0", "1", "2", "3"]),
        (CONFIG, 4, ["0", "1", "2", "3"]),  # of a run whose config says something else
        (None, 2, ["0", "1"]),
    ],
)
def test_rows_of_the_heat_map_have_the_model_s_layer_numbers(tmp_path, config, rows, names):
    folder = run_folder(tmp_path / "run", [[[3, 1, 2, 2]] * rows])
    (folder / CONFIG_FILE).write_text(json.dumps({MARK: 1, "model": config_dict(config)}))
    axes = draw_expert_load([folder]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert axes.get_yticks().tolist() == list(range(rows))
