import dataclasses
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.generation.decoding import advance
from llmq_jax.generation.request import Request
from llmq_jax.layers.expert_balance import Balance, all_layers, balance_losses, max_violation, moved_bias, report
from llmq_jax.layers.expert_blocks import block_lengths, in_blocks
from llmq_jax.layers.expert_dispatch import MOST_APART, MOST_ROWS_APART, _sorted, choose, dispatch, slots_each
from llmq_jax.layers.expert_exchange import dispatch_on_mesh
from llmq_jax.layers.expert_weights import ExpertWeights
from llmq_jax.layers.experts_apart import by_expert
from llmq_jax.layers.feedforward import MLP
from llmq_jax.layers.moe import SCORES, Experts, MixtureOfExperts, balance_from, experts_from, route
from llmq_jax.models import override

NORMAL = nn.initializers.normal(0.3)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def draw(seed, tokens, count, top_k, width=6, hidden=10, parts=2, biases=False, spread=1.0):
    """(x, ids, weights, experts): distinct ids for each token; a small spread sends all to the same few experts."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    popularity = rng.standard_normal(count) / spread
    ids = np.argsort(-(popularity + rng.gumbel(size=(tokens, count))), axis=1)[:, :top_k]
    experts = ExpertWeights(
        up=normal(count, width, parts, hidden),
        down=normal(count, hidden, width),
        up_bias=normal(count, parts, hidden) if biases else None,
        down_bias=normal(count, width) if biases else None,
    )
    return normal(tokens, width), jnp.asarray(ids, jnp.int32), jnp.abs(normal(tokens, top_k)), experts


def activate(parts):
    first = jax.nn.silu(parts[..., 0, :])
    return first * parts[..., 1, :] if parts.shape[-2] == 2 else first


@partial(jax.jit, static_argnums=(0, 5))
def value_and_gradients(name, x, ids, weights, experts, capacity=None):
    grad = np.random.default_rng(9).standard_normal(x.shape).astype(np.float32)

    def compute(x, weights, experts):
        mixed, dropped = dispatch(x, ids, weights, experts, activate, name, capacity)
        return (mixed * grad).sum(), (mixed, dropped)

    (_, (mixed, dropped)), gradients = jax.value_and_grad(compute, (0, 1, 2), has_aux=True)(x, weights, experts)
    return (mixed, gradients), dropped


@partial(jax.jit, static_argnums=4)
def dispatched(x, ids, weights, experts, name):
    return dispatch(x, ids, weights, experts, activate, name)[0]


@partial(jax.jit, static_argnums=0)
def apply(layer, variables, *inputs, key=None):
    return layer.apply(variables, *inputs, rngs=None if key is None else {"dropout": key})


@partial(jax.jit, static_argnums=0)
def drawn(layer, x):
    return layer.init(jax.random.key(0), x)


def assert_close(ours, theirs, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 1e-4, "atol": 1e-4})), ours, theirs
    )


CASES = {
    "several blocks an expert": {"tokens": 100, "count": 4, "top_k": 2},
    "more experts than assignments": {"tokens": 3, "count": 16, "top_k": 2},
    "one token": {"tokens": 1, "count": 8, "top_k": 2},
    "biases, plain": {"tokens": 37, "count": 5, "top_k": 3, "biases": True, "parts": 1},
    "biases, gated": {"tokens": 37, "count": 5, "top_k": 1, "biases": True},
    "most experts empty": {"tokens": 90, "count": 12, "top_k": 1, "spread": 0.05},
    "every expert": {"tokens": 20, "count": 3, "top_k": 3},
}


@pytest.mark.parametrize("padding", [False, True], ids=["all real", "with padding"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.product
def test_implementations_agree_in_outputs_and_all_gradients(case, padding):
    x, ids, weights, experts = draw(0, **CASES[case])
    if padding:
        ids = jnp.where((jnp.arange(len(x)) % 3 == 1)[:, None], CASES[case]["count"], ids)
    expected, _ = jax.device_get(value_and_gradients("dense", x, ids, weights, experts))
    for name in ("blocks", "ragged", "grouped"):
        assert_close(value_and_gradients(name, x, ids, weights, experts)[0], expected)
    everything = slots_each(float(CASES[case]["count"]), ids.size, CASES[case]["count"])
    found, dropped = value_and_gradients("capacity", x, ids, weights, experts, everything)
    assert dropped == 0
    assert_close(found, expected)
    if padding and len(x) > 1:
        mixed, (grad_of_x, grad_of_weights, _) = expected
        assert not mixed[1].any() and not grad_of_x[1].any() and not grad_of_weights[1].any()


@pytest.mark.parametrize("adapted", [False, True], ids=["", "with adapters"])
@pytest.mark.parametrize("case", CASES)
def test_experts_that_lie_apart_give_the_same(case, adapted):
    x, ids, weights, experts = draw(0, **CASES[case])
    ids = jnp.where((jnp.arange(len(x)) % 3 == 1)[:, None], CASES[case]["count"], ids)  # padding
    if adapted:
        pairs = {}
        for name, stack in (("up", experts.up), ("down", experts.down)):
            first = jax.random.normal(jax.random.key(1), (*stack.shape[:2], 2))
            pairs[name + "_low_rank"] = first, jax.random.normal(jax.random.key(2), (len(stack), 2, *stack.shape[2:]))
        experts = experts.replace(**pairs)
    kernels = by_expert({"moe": {"up_kernel": experts.up, "down_kernel": experts.down}})["moe"]
    apart = experts.replace(up=kernels["up_kernel_apart"], down=kernels["down_kernel_apart"])
    assert_close(dispatched(x, ids, weights, apart, "auto"), dispatched(x, ids, weights, experts, "dense"))
    with pytest.raises(BadInput, match="lie apart"):
        dispatch(x, ids, weights, apart, activate, "dense")


def test_an_expert_that_overflows_stays_with_its_own_tokens():
    x, ids, weights, experts = draw(2, tokens=8, count=4, top_k=1)
    ids = ids.at[:, 0].set(jnp.arange(8) % 2)
    apart = experts.replace(up=tuple(up.reshape(len(up), -1).T for up in experts.up), down=tuple(experts.down.mT))
    spoilt = apart.replace(down=(apart.down[0] * jnp.inf, *apart.down[1:]))
    found, expected = (dispatched(x, ids, weights, each, "auto") for each in (spoilt, apart))
    assert_close(found[1::2], expected[1::2])
    assert not np.isfinite(found[::2]).any()


def test_decoding_a_token_reads_no_stack_of_experts():
    """Nor does it copy an expert's matrices, as an index into the stack would."""
    config = override(lq.MixtralConfig(), **TINY, num_local_experts=6, num_experts_per_tok=2)
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config))
    request = Request.create(lm, [[1, 2, 3]], 8, lq.Sampler(temperature=0.0), (), 0)
    leaves, structure = jax.tree.flatten((*lm.sliced(1), request.start()))

    def tokens(leaves):
        outside, layers, state = jax.tree.unflatten(structure, leaves)
        return advance(lm.model, outside, layers, state, 8, sampler=request.sampler, end_tokens=()).tokens

    program = jax.jit(tokens).lower(leaves).compile().as_text()
    assert all(f"f32[{shape}]" in program for shape in ("48,16", "16,24"))
    assert not re.search(r"= f32\[(1,)?(48,16|16,24)\]\S* (?!parameter|get-tuple-element|bitcast)", program)
    assert not re.search(r"f32\[6,(48|16|24),", program)


def test_when_experts_lie_apart(monkeypatch):
    def apart(rows, **fields):
        config = override(lq.MixtralConfig(), **TINY | fields)
        lm = lq.LanguageModel(config, lq.build(config), lq.init(config))
        return "up_kernel_apart" in str(jax.tree_util.tree_leaves_with_path(lm.sliced(rows)))

    assert apart(1) and apart(MOST_ROWS_APART) and not apart(MOST_ROWS_APART + 1)
    assert not apart(1, num_local_experts=MOST_APART + 1)
    assert apart(1, experts={"dispatch": "blocks"}) and not apart(1, experts={"dispatch": "dense"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not apart(1)


def test_what_is_taken_where_none_is_said():
    assert choose("auto") == "blocks"


@pytest.mark.parametrize("most", [5, 2**30])  # 2**30 times 100 ids is no 32-bit number
def test_sorting_keeps_the_order_of_equals(most):
    ids = np.random.default_rng(0).integers(0, 6, 100) * (most // 5)
    order, inverse = _sorted(jnp.asarray(ids), most)
    np.testing.assert_array_equal(order, np.argsort(ids, stable=True))
    np.testing.assert_array_equal(order[inverse], np.arange(100))


@pytest.mark.parametrize("lengths", [(1,), (3,), (2, 5, 7), (16, 64)], ids=str)
def test_the_lengths_of_blocks_change_nothing(lengths):
    x, ids, _, experts = draw(1, tokens=50, count=6, top_k=1, biases=True)
    order = np.argsort(ids[:, 0], kind="stable")
    sizes = jnp.bincount(ids[:, 0], length=6)
    mixed = jax.jit(in_blocks, static_argnums=(3, 4))(x[order], experts, sizes, activate, lengths)
    expected = dispatched(x, ids, jnp.ones((50, 1)), experts, "dense")
    assert_close(mixed, np.asarray(expected)[order])


def test_gradients_in_bfloat16_add_up_in_float32():
    """Of fifty blocks an expert. All matrices are the identity, so that each gradient is a plain sum."""
    rng = np.random.default_rng(0)
    rows, grad = (jnp.asarray(rng.uniform(0.5, 1.5, (800, 32)), jnp.bfloat16) for _ in range(2))
    identity = jnp.broadcast_to(jnp.eye(32, dtype=jnp.bfloat16), (2, 32, 32))
    zeros = jnp.zeros((2, 32), jnp.bfloat16)
    experts = ExpertWeights(identity[:, :, None], identity, zeros[:, None], zeros)
    mix = partial(in_blocks, sizes=jnp.array([400, 400]), activation=lambda parts: parts[..., 0, :], lengths=(8,))
    found = jax.jit(lambda experts: jax.vjp(lambda experts: mix(rows, experts), experts)[1](grad)[0])(experts)
    x, g = (np.asarray(leaf, np.float64).reshape(2, 400, 32) for leaf in (rows, grad))
    of_matrix, of_bias = x.swapaxes(1, 2) @ g, g.sum(1)
    exact = ExpertWeights(of_matrix[:, :, None], of_matrix, of_bias[:, None], of_bias)
    for ours, sums in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert (ours == jnp.asarray(sums, jnp.bfloat16)).mean() > 0.995  # all but ties


def test_blocks_are_as_long_as_an_expert_needs():
    assert block_lengths(4096, 64) == (16, 32, 48, 56, 64, 72, 80, 96, 128)
    assert block_lengths(4096, 8)[::8] == (128, 1024)
    assert block_lengths(4096, 1)[::8] == (128, 1024)
    assert block_lengths(40, 8) == (16, 32, 40)
    assert block_lengths(2, 8) == (2,)


def test_rows_that_are_not_finite_stay_with_their_own_experts():
    """The rest of a block reads on into the next expert's rows, and past the last one into padding."""
    x, ids, weights, experts = draw(2, tokens=40, count=4, top_k=1)
    ids = ids.at[7].set(4)
    mixed = dispatched(x.at[7].set(jnp.nan), ids, weights, experts, "blocks")
    expected = dispatched(x, ids, weights, experts, "dense")
    others = np.arange(40) != 7
    assert_close(np.asarray(mixed)[others], np.asarray(expected)[others])


def test_capacity_drops_the_last_tokens_of_a_full_expert_and_counts_them():
    x, _, weights, experts = draw(3, tokens=6, count=3, top_k=1)
    ids = jnp.asarray([[0], [0], [1], [0], [3], [0]])
    (mixed, _), dropped = value_and_gradients("capacity", x, ids, weights, experts, 2)
    assert dropped == 2
    kept = jnp.where(jnp.asarray([[0], [0], [0], [1], [1], [1]], bool), 3, ids)
    (expected, _), _ = value_and_gradients("dense", x, kept, weights, experts)
    assert_close(mixed, expected)
    assert slots_each(1.25, 4096, 8) == 640
    assert slots_each(1.25, 10, 4) == 4
    assert slots_each(100.0, 4096, 8) == 4096, "more slots than there is to hold"


def test_padding_counts_in_the_slots_and_takes_none():
    """As in GShard and Switch: slots are a shape, so that what is padding leaves its share to the other tokens."""
    x, _, weights, experts = draw(3, tokens=8, count=2, top_k=1)
    alone, padded = jnp.zeros((4, 1), int), jnp.asarray([[0]] * 4 + [[2]] * 4)
    _, dropped = dispatch_on_mesh(x[:4], alone, weights[:4], experts, activate, "capacity", 1.0)
    assert dropped == 2  # 1.0 · 4 tokens / 2 experts
    both = jnp.tile(jnp.arange(2), (4, 1))
    _, dropped = dispatch_on_mesh(x[:4], both, weights[:8].reshape(4, 2), experts, activate, "capacity", 1.0)
    assert dropped == 0  # 1.0 · 4 tokens · 2 choices / 2 experts
    mixed, dropped = dispatch_on_mesh(x, padded, weights, experts, activate, "capacity", 1.0)
    assert dropped == 0
    assert_close(mixed, dispatch(x, padded, weights, experts, activate, "dense")[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_routing_in_groups_with_a_bias(score):
    experts = Experts(12, 3, score=score, num_groups=4, top_groups=2, selection_bias=True, scaling_factor=2.5)
    rng = np.random.default_rng(0)
    logits, bias = rng.standard_normal((20, 12)), rng.standard_normal(12) / 3
    ids, weights, probabilities = route(jnp.asarray(logits, jnp.float32), experts, jnp.asarray(bias, jnp.float32))
    exponentials = np.exp(logits)
    scores = exponentials / exponentials.sum(1, keepdims=True) if score == "softmax" else 1 / (1 + np.exp(-logits))
    for row in range(20):
        choice = scores[row] + bias
        best = sorted(range(4), key=lambda g: -np.sort(choice[3 * g : 3 * g + 3])[-2:].sum())[:2]
        allowed = [e for e in range(12) if e // 3 in best]
        expected = sorted(allowed, key=lambda e: -choice[e])[:3]
        assert ids[row].tolist() == expected
        np.testing.assert_allclose(weights[row], 2.5 * scores[row][expected] / scores[row][expected].sum(), rtol=1e-5)
    np.testing.assert_allclose(probabilities, scores / scores.sum(1, keepdims=True), rtol=1e-5)
    plain = dataclasses.replace(experts, renormalise=False, scaling_factor=1.0)
    ids, weights, _ = route(jnp.asarray(logits, jnp.float32), plain)
    np.testing.assert_allclose(weights, np.take_along_axis(scores, np.asarray(ids), 1), rtol=1e-5)


def test_a_score_of_ones_own_is_what_chooses_and_weighs(monkeypatch):
    monkeypatch.setitem(SCORES, "squared", lambda logits: jnp.square(jax.nn.relu(logits)))
    logits = jnp.array([[3.0, -4.0, 2.0, 1.0]])
    ids, weights, probabilities = route(logits, Experts(4, 2, score="squared"))
    assert ids.tolist() == [[0, 2]]
    np.testing.assert_allclose(weights, [[9 / 13, 4 / 13]], rtol=1e-6)
    np.testing.assert_allclose(probabilities, [[9 / 14, 0, 4 / 14, 1 / 14]], rtol=1e-6)


def test_where_a_score_is_0_no_expert_is_taken(monkeypatch):
    """By the router of docs/moe.md, whose experts choose tokens: each takes as many as the others."""
    page = (Path(__file__).parents[2] / "docs" / "moe.md").read_text()
    mark = "<!-- executed by tests/layers/test_moe.py -->"
    (code,) = re.findall(rf"{re.escape(mark)}\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setitem(SCORES, "expert_choice", None)  # so that it is taken out again
    exec(code, scope := {})
    assert scope["config"].usual_experts.top_k == 8
    experts = Experts(4, 4, score="expert_choice", renormalise=False)
    layer = MixtureOfExperts(experts, 10, True, "silu", False, NORMAL, NORMAL)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 8)), jnp.float32)
    variables = drawn(layer, x)
    output, found = apply(layer, variables, x)
    assert found.assigned.tolist() == [6, 6, 6, 6]
    dense = layer.clone(experts=dataclasses.replace(experts, dispatch="dense"))
    assert_close(output, apply(dense, variables, x)[0])


@partial(jax.jit, static_argnums=0)
def reports_of(experts, logits, real):
    ids, _, probabilities = route(logits, experts)
    dropped = jnp.zeros((), jnp.int32)
    reports = [report(*leaves, real, dropped) for leaves in zip(logits, probabilities, ids, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports), ids, probabilities


def reported(seed=0, layers=3, rows=2, length=10, count=8, top_k=2, real=None):
    """Reports of several layers, stacked, with the arrays that they come from."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.standard_normal((layers, rows, length, count)), jnp.float32)
    real = jnp.asarray(np.ones((rows, length), bool)) if real is None else real
    reports, ids, probabilities = reports_of(Experts(count, top_k), logits, real)
    return reports, *jax.device_get((logits, ids, probabilities))


terms = jax.jit(balance_losses, static_argnums=(1, 2))


def test_the_losses_are_the_formulas():
    real = np.arange(10)[None] < np.array([[10], [4], [0]])  # the last row fills the batch up
    reports, logits, ids, probabilities = reported(rows=3, real=jnp.asarray(real))
    every = Balance(load_balance=1.0, router_z=1.0, sequence=1.0, device=1.0, devices=4)
    losses = terms(reports, every, 2)
    by_layer, by_device, by_row, z = [], [], [], []
    for layer in range(3):
        chosen = np.eye(8)[np.asarray(ids[layer])].sum(2)[real]
        p = np.asarray(probabilities[layer])[real]
        f = chosen.mean(0) / 2
        by_layer.append(8 * (f * p.mean(0)).sum())
        groups = (8 * f).reshape(4, 2).mean(1), p.mean(0).reshape(4, 2).sum(1)
        by_device.append((groups[0] * groups[1]).sum())
        z.append((np.log(np.exp(np.asarray(logits[layer])[real]).sum(-1)) ** 2).mean())
        for row in range(2):
            c, q = np.eye(8)[np.asarray(ids[layer, row])].sum(1)[real[row]], probabilities[layer, row][real[row]]
            by_row.append(8 * (c.mean(0) / 2 * q.mean(0)).sum())
    np.testing.assert_allclose(losses["load_balance"], np.mean(by_layer), rtol=1e-5)
    np.testing.assert_allclose(losses["device"], np.mean(by_device), rtol=1e-5)
    np.testing.assert_allclose(losses["router_z"], np.mean(z), rtol=1e-5)
    np.testing.assert_allclose(losses["sequence"], np.mean(by_row), rtol=1e-5)
    pooled = terms(reports, Balance(load_balance=1.0, pooled=True), 2)["load_balance"]
    undivided = terms(reports, Balance(load_balance=1.0, pooled=True, divide_by_top_k=False), 2)
    np.testing.assert_allclose(undivided["load_balance"], 2 * pooled, rtol=1e-6)
    assert abs(pooled - losses["load_balance"]) > 1e-3  # the mean of products is not the product of means
    assert not terms(reports, Balance(), 2)


def test_an_even_load_costs_one():
    ids = jnp.asarray([[[0, 1], [2, 3], [4, 5], [6, 7]]])
    even = report(
        jnp.zeros((1, 4, 8)), jnp.full((1, 4, 8), 1 / 8), ids, jnp.ones((1, 4), bool), jnp.zeros((), jnp.int32)
    )
    reports = jax.tree.map(lambda leaf: leaf[None], even)
    losses = balance_losses(reports, Balance(load_balance=1.0, sequence=1.0, device=1.0, devices=2), 2)
    np.testing.assert_allclose(list(losses.values()), 1.0, rtol=1e-6)
    assert max_violation(even.assigned) == 0.0


def test_padding_counts_nowhere():
    layer = MixtureOfExperts(Experts(4, 2), 8, True, "silu", False, NORMAL, NORMAL)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 6)), jnp.float32)
    variables = drawn(layer, x)
    real = np.arange(9)[None] < np.array([[9], [5]])
    mixed, padded = jax.device_get(apply(layer, variables, x, real))
    alone, short = jax.device_get(apply(layer, variables, x[1:, :5]))
    np.testing.assert_allclose(mixed[1, :5], alone[0], **CLOSE)
    _, first = jax.device_get(apply(layer, variables, x[:1]))
    assert_close(padded, jax.tree.map(np.add, first, short))


def test_padding_alone_costs_nothing_and_moves_nothing():
    """As a micro-batch of rows that fill a batch up: nothing is divided by its tokens."""
    reports, *_ = reported(real=jnp.zeros((2, 10), bool))
    every = Balance(load_balance=1.0, router_z=1.0, sequence=1.0, device=1.0, devices=4)
    assert set(map(float, terms(reports, every, 2).values())) == {0.0}
    proportional = Balance(bias_rate=0.1, bias_update="proportional")
    assert not moved_bias(jnp.zeros((3, 8)), reports.assigned, proportional).any()
    assert not max_violation(reports.assigned).any()


def test_a_bias_moves_against_the_load():
    bias, assigned = jnp.zeros((2, 4)), jnp.asarray([[4, 0, 2, 2], [2, 2, 2, 2]])
    np.testing.assert_allclose(moved_bias(bias, assigned, Balance(bias_rate=0.1)), [[-0.1, 0.1, 0, 0], [0, 0, 0, 0]])
    proportional = Balance(bias_rate=0.1, bias_update="proportional")
    np.testing.assert_allclose(moved_bias(bias, assigned, proportional)[0], [-0.1, 0.1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(max_violation(assigned), [1.0, 0.0])


def test_the_bias_chooses_and_does_not_weigh():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    experts = Experts(4, 2, selection_bias=True)
    ids, weights, _ = route(logits, experts, jnp.asarray([-9.0, 0.0, 0.0, 9.0]))
    assert ids.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights[0], np.exp([-1.0, 1.0]) / np.exp([-1.0, 1.0]).sum(), rtol=1e-5)


def test_the_router_computes_in_float32():
    """Rounded to bfloat16, near-ties would go to other experts."""
    layer = MixtureOfExperts(Experts(4, 2), 8, True, "silu", False, NORMAL, NORMAL, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 6)), jnp.bfloat16)
    variables = drawn(layer, x)
    _, counts = apply(layer, variables, x)
    logits = np.asarray(x, np.float64) @ np.asarray(variables["params"]["router"]["kernel"])
    np.testing.assert_allclose(counts.squared_logsumexp, (np.log(np.exp(logits).sum(-1)) ** 2).sum(), rtol=1e-5)


def test_noise_acts_in_training_alone_and_its_size_is_learned():
    layer = MixtureOfExperts(Experts(8, 2, noise=True), 8, True, "silu", False, NORMAL, NORMAL)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 30, 6)), jnp.float32)
    variables = drawn(layer, x)
    still = np.asarray(apply(layer, variables, x)[0])
    np.testing.assert_array_equal(still, apply(layer, variables, x)[0])

    @jax.jit
    @jax.grad
    def grad(params, key):
        return jnp.square(layer.apply({"params": params}, x, rngs={"dropout": key})[0]).sum()

    noisy, _ = apply(layer, variables, x, key=jax.random.key(1))
    assert np.abs(np.asarray(noisy) - still).max() > 1e-2
    assert np.abs(grad(variables["params"], jax.random.key(1))["noise"]["kernel"]).max() > 0
    # A size is softplus(x W), which is 0 where that is far below 0, and far above it x W itself.
    quiet = {"params": {**variables["params"], "noise": {"kernel": jnp.full((6, 8), -99.0)}}}
    found, expected = (apply(layer, quiet, jnp.abs(x), key=key)[0] for key in (jax.random.key(1), None))
    np.testing.assert_allclose(found, expected, **CLOSE)
    variables["params"]["router"]["kernel"] = jnp.zeros((6, 8))
    spreads = []
    for width in (6.0, 12.0):
        loud = {"params": {**variables["params"], "noise": {"kernel": jnp.full((6, 8), width)}}}
        spreads.append(float(apply(layer, loud, jnp.ones_like(x), key=jax.random.key(1))[1].squared_logsumexp))
    np.testing.assert_allclose(spreads[1], 4 * spreads[0], rtol=2e-2)


def test_shared_experts_see_every_token_at_a_learned_weight():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 6)), jnp.float32)
    experts = Experts(4, 1, num_shared=2, shared_weight=True, intermediate_size=5)
    layer = MixtureOfExperts(experts, 99, True, "silu", False, NORMAL, NORMAL)
    variables = drawn(layer, x)
    assert variables["params"]["shared"]["gate"]["kernel"].shape == (6, 10)
    mixed, _ = apply(layer, variables, x)
    without = dataclasses.replace(experts, num_shared=0, shared_weight=False)
    params = {name: leaf for name, leaf in variables["params"].items() if not name.startswith("shared")}
    plain = MixtureOfExperts(without, 99, True, "silu", False, NORMAL, NORMAL)
    routed, _ = apply(plain, {"params": params}, x)
    kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in variables["params"]["shared"].items()}
    gate = np.asarray(x) @ kernels["gate"]
    shared = (gate / (1 + np.exp(-gate)) * (np.asarray(x) @ kernels["up"])) @ kernels["down"]
    np.testing.assert_allclose(np.asarray(mixed) - np.asarray(routed), shared / 2, **CLOSE)  # sigmoid(0)


@pytest.mark.parametrize("gated", [False, True])
def test_all_kernels_that_add_to_the_stream_start_as_they_are_told(gated):
    """Those of routed experts, of shared ones and of the network whose place they take: by the matrix of one expert."""

    def fan_in(key, shape, dtype=jnp.float32):
        return jnp.full(shape, shape[0], dtype)

    x = jnp.ones((1, 3, 6))
    kind = (8, gated, "silu", False, NORMAL, fan_in)
    moe = drawn(MixtureOfExperts(Experts(4, 2, num_shared=1), *kind), x)["params"]
    mlp = drawn(MLP(8, "silu", NORMAL, fan_in, gated=gated), x)["params"]
    for kernel in (moe["down_kernel"], moe["shared"]["down"]["kernel"], mlp["down"]["kernel"]):
        assert (kernel == 8).all()
    assert {name for name in mlp if name != "down"} == ({"gate", "up"} if gated else {"up"})
    assert not any((mlp[name]["kernel"] == 8).any() for name in mlp if name != "down")
    assert not (moe["up_kernel"][0] == moe["up_kernel"][1]).any(), "each expert draws its own"


def test_what_experts_say_of_themselves_goes_before_what_the_network_has():
    """Whether they are gated and have biases, and their activation: of the shared ones too."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 6)), jnp.float32)
    own = Experts(4, 2, num_shared=1, gated=False, bias=True, activation="relu")
    said = MixtureOfExperts(own, 8, True, "silu", False, NORMAL, NORMAL)
    inherited = dataclasses.replace(own, gated=None, bias=None, activation=None)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, drawn(said, x))
    assert {"up_bias", "down_bias"} <= variables["params"].keys()
    assert "bias" in variables["params"]["shared"]["down"]
    plain = MixtureOfExperts(inherited, 8, False, "relu", True, NORMAL, NORMAL)
    assert jax.tree.structure(variables) == jax.tree.structure(drawn(plain, x))
    np.testing.assert_array_equal(apply(said, variables, x)[0], apply(plain, variables, x)[0])


def test_layers_are_counted_in_order():
    def block(*layers):
        return {"router": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}

    reports, *_ = reported(layers=5)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], reports) for i in range(5)]
    counts = {
        "group_0": {"block_0": {}},
        "group_1": {"block_0": block(layers[0], layers[2]), "block_1": block(layers[1], layers[3])},
        "group_2": {"block_0": block(layers[4])},
    }
    assert_close(all_layers(counts), reports)
    assert all_layers({"group_0": {"block_0": {}}}) is None


def test_more_than_ten_layers_of_a_kind_are_counted_in_order():
    """A compiled function returns dicts sorted by name, "group_10" before "group_2"."""
    reports, *_ = reported(layers=24)
    layers = [{"router": jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], reports)} for i in range(24)]
    counts = {f"group_{i}": {"block_0": layers[i]} for i in range(10)}
    counts["group_10"] = {f"block_{i}": layers[10 + i] for i in range(12)}
    counts |= {"group_10_upper": {"block_0": layers[22]}, "mtp": {"block_0": layers[23]}}
    assert_close(all_layers(jax.jit(lambda tree: tree)(counts)), reports)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k=9 is more than num_experts=8"),
        ({"num_groups": 3}, "num_groups=3 must divide num_experts=8"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups=5 is more than num_groups=4"),
        ({"num_groups": 8, "top_k": 2}, "top_k=2 is more than the 1 experts of top_groups"),
        ({"capacity_factor": 1.0}, "capacity_factor=1.0 needs dispatch='capacity'"),
        ({"dispatch": "capacity"}, "capacity_factor=None is needed by dispatch='capacity'"),
        ({"dispatch": "capacity", "capacity_factor": 0.0}, "must be positive, or all is dropped"),
        ({"dispatch": "capacity", "capacity_factor": math.inf}, "capacity_factor=inf must be finite"),
        ({"scaling_factor": math.inf}, "scaling_factor=inf must be positive, and finite"),
        ({"dispatch": "sorted"}, "dispatch='sorted' is unknown"),
        ({"score": "tanh"}, "score='tanh' is none of softmax, sigmoid"),
        ({"activation": "prelu"}, "activation='prelu' is none of"),
        ({"shared_weight": True}, "has no effect without num_shared"),
        ({"experts": 3}, "there is no field 'experts'"),
        ({"first_layer": 4}, "first_layer=4 leaves no expert in 4 layers"),
        ({"dense_layers": [4]}, "dense_layers=[4] must be numbers of the 4 layers"),
        ({"balance": {"bias_rate": 0.1}}, "balance: bias_rate=0.1 moves a bias that needs selection_bias=true"),
        ({"balance": {"device": 0.1, "devices": 3}}, "balance: devices=3 must divide 8 experts"),
        ({"balance": {"device": 0.1}}, "needs devices"),
        ({"balance": {"devices": 2}}, "devices=2 has no effect without device"),
        ({"balance": {"pooled": True}}, "pooled=True has no effect without load_balance"),
        ({"balance": {"bias_update": "proportional"}}, "has no effect without bias_rate"),
        ({"balance": {"load_balance": -1.0}}, "load_balance=-1.0 must be at least 0"),
        ({"balance": {"bias_rate": 0.1, "bias_update": "signs"}}, "bias_update='signs'"),
        ({"balance": {"loss": 0.1}}, "there is no field 'loss'"),
        ({"num_experts": "8"}, "num_experts='8' is not of the type int"),
        ({"balance": {"router_z": "high"}}, "router_z='high' is not of the type float"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        experts_from(fields, layers=4)
    assert "\n" not in str(error.value)


def test_what_is_no_description_of_experts():
    with pytest.raises(BadInput, match="experts=3 is neither Experts nor an object of their fields"):
        experts_from(3, 2)
    with pytest.raises(BadInput, match="balance=3 is neither a Balance nor an object of its fields"):
        balance_from(3)
