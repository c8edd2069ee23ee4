import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import GPT2Config, init
from llmq_jax.training.optimizer import DECAYED, adamw, decay_mask, muon, orthogonalised, warmup_cosine, warmup_schedule
from llmq_jax.training.roles import ROLES, roles
from tests.weights import draw_variables


def test_learning_rate_starts_at_the_initial_rate_and_reaches_the_minimum_exactly():
    rate = warmup_schedule(peak=1e-3, steps=50, warmup_steps=10, initial=1e-5, minimum=1e-4)
    rates = np.array([float(rate(step)) for step in range(60)])
    same = warmup_cosine(1e-3, 50, 10, initial=1e-5, minimum=1e-4)
    np.testing.assert_array_equal([float(same(step)) for step in range(60)], rates)
    optax_s = optax.warmup_cosine_decay_schedule(1e-5, 1e-3, 10, 49, 1e-4)
    np.testing.assert_allclose([float(optax_s(step)) for step in range(60)], rates, rtol=1e-5)
    np.testing.assert_allclose(rates[0], 1e-5, rtol=1e-6)
    np.testing.assert_allclose(rates[5], (1e-5 + 1e-3) / 2, rtol=1e-6)
    np.testing.assert_allclose(rates[10], 1e-3, rtol=1e-6)
    assert rates[48] > rates[49]
    assert (rates[49:] == np.float32(1e-4)).all()
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:50]) < 0).all()


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [0.5, 1, 0.95, 0.9, 0.55, 0.5, 0.15, 0.1, 0.1]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 0.55, 0.1, 0.1]),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_other_decays(decay, expected):
    """By hand: from the peak at step 2 to a tenth of it at step 20, the last."""
    at = [1, 2, 3, 4, 11, 12, 19, 20, 30]
    for minimum in (0.0, 1.0) if decay == "constant" else (0.1,):
        rate = warmup_schedule(peak=1.0, steps=21, warmup_steps=2, minimum=minimum, decay=decay)
        np.testing.assert_allclose([float(rate(step)) for step in at], expected, rtol=1e-6)


def test_the_fall_of_wsd_takes_one_step_at_least_and_none_of_the_warm_up():
    short, warm = (warmup_schedule(peak=1.0, steps=5, warmup_steps=steps, decay="wsd") for steps in (0, 4))
    assert [float(short(step)) for step in (3, 4)] == [1, 0]
    assert float(warm(4)) == 1


def test_the_fall_of_wsd_is_as_long_as_asked_for():
    """So that a run that branches off another's plateau falls from where it does so."""
    short, long = (
        warmup_schedule(peak=1.0, steps=steps, warmup_steps=2, minimum=0.0, decay="wsd", decay_steps=fall)
        for steps, fall in ((21, 4), (41, 10))
    )
    np.testing.assert_allclose([float(short(step)) for step in (15, 16, 17, 18, 20)], [1, 1, 0.75, 0.5, 0], rtol=1e-6)
    np.testing.assert_array_equal([short(step) for step in range(17)], [long(step) for step in range(17)])
    np.testing.assert_allclose([float(long(step)) for step in (30, 35, 40)], [1, 0.5, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak": 1e-3, "steps": 10, "decay_steps": 3}, "decay_steps=3 has no effect with decay='cosine'"),
        (
            {"peak": 1e-3, "steps": 10, "warmup_steps": 2, "decay": "wsd", "decay_steps": 8},
            "decay_steps=8 does not fit: 10 steps less 2 of warm-up leave room for 7",
        ),
        ({"peak": 1e-3, "steps": 10, "minimum": 1e-4, "decay": "constant"}, "minimum=0.0001 has no effect with decay"),
        ({"peak": 1e-3, "steps": 10, "decay": "cosin"}, "decay='cosin' is unknown; did you mean cosine"),
        ({"peak": 1e-3, "steps": 10, "warmup_steps": 10}, "warm-up of 10 steps does not fit a run of 10"),
        ({"peak": 1e-3, "steps": 10, "warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        ({"peak": 1e-3, "steps": 10, "minimum": 1e-2}, "minimum learning rate 0.01 must lie between 0 and the peak"),
        ({"peak": 1e-3, "steps": 10, "initial": -1e-5}, "initial learning rate -1e-05 must lie between 0 and the peak"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        (warmup_schedule if {"decay", "decay_steps"} & options.keys() else warmup_cosine)(**options)


def test_decay_goes_by_role_and_not_by_rank():
    params = init(GPT2Config(vocab_size=11, hidden_size=4, num_hidden_layers=2, num_attention_heads=2))["params"]
    decayed = {jax.tree_util.keystr(path) for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(params)) if on}
    assert all("kernel" in name or "embedding" in name for name in decayed)
    assert len(decayed) == 6
    # The trap: a stack of biases has two axes and more.
    assert params["group_0"]["block_0"]["attention"]["qkv"]["bias"].ndim == 4
    matrices = {"kernel", "up_kernel", "down_kernel", "embedding", "A", "B", "M", "v"}
    assert {name for name, role in ROLES.items() if role in DECAYED} == matrices


def test_a_parameter_without_a_role_is_named():
    told = r"parameter block/gain has no role; give the name 'gain' one in llmq_jax.*ROLES: kernel or embedding, which"
    with pytest.raises(BadInput, match=told):
        decay_mask({"block": {"gain": jnp.ones(())}})


@pytest.mark.parametrize(("gradient", "clipped"), [([30.0, 40.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])])
def test_every_update_is_clipped(gradient, clipped):
    """A gradient shorter than that stays as it is."""
    optimizer = adamw(1.0, clip=1.0, weight_decay=0.0)
    params = {"kernel": jnp.zeros(2)}
    state = optimizer.init(params)
    _, state = optimizer.update({"kernel": jnp.array(gradient)}, state, params)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moments["kernel"], 0.1 * np.array(clipped), rtol=1e-6)


@pytest.mark.parametrize(
    "fields", [{}, {"variant": "dora"}, {"variant": "lora-xs"}, {"variant": "tinylora"}, {"tied": True}]
)
def test_adapters_of_every_kind_have_roles(fields):
    """Or they could not be trained."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = lq.Llama3Config(**sizes, intermediate_size=8)
    lm = lq.LanguageModel(config, lq.build(config), draw_variables(config), None, lq.GenerationConfig())
    fields = {"variant": "tinylora", **fields} if "tied" in fields else fields
    adapted = lq.lora(lm, rank=2, **fields)
    assert set(jax.tree.leaves(roles(adapted.variables["lora"]))) <= {"kernel", "norm"}
    adamw(0.1).init(adapted.variables["lora"])
    with pytest.raises(BadInput, match="muon has nothing to do: no matrix of a layer is among what trains"):
        muon(0.1).init(adapted.variables["lora"])


@pytest.mark.parametrize("moments", ["bfloat16", "first-bfloat16"])
def test_moments_in_bfloat16_take_half_the_memory_and_lead_to_the_same_place(moments):
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=64), jnp.float32)

    adam = partial(adamw, 0.03, b1=0.9, b2=0.95, weight_decay=0.0)

    def trained(**options):
        optimizer = adam(**options)
        params = {"kernel": jnp.zeros(64)}
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            gradient = jax.grad(lambda params: jnp.square(params["kernel"] - target).sum())(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(200):
            params, state = step(params, state)
        return params["kernel"], state

    (whole, in_float32), (rounded, in_bfloat16) = trained(), trained(moments=moments)
    for name, kept in (("mu", "bfloat16"), ("nu", moments.replace("first-bfloat16", "float32"))):
        assert optax.tree_utils.tree_get(in_float32, name)["kernel"].dtype == jnp.float32
        assert optax.tree_utils.tree_get(in_bfloat16, name)["kernel"].dtype == kept
    np.testing.assert_allclose(rounded, target, atol=0.02)
    np.testing.assert_allclose(rounded, whole, atol=0.02)
    assert not np.array_equal(rounded, whole)
    # An update is computed in float32 from the moments as they are kept.
    gradient, params = {"kernel": target}, {"kernel": whole}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, in_bfloat16)
    of_rounded, of_wide = (
        optimizer.update(gradient, state, params)[0]
        for optimizer, state in ((adam(moments=moments), in_bfloat16), (adam(), wide))
    )
    np.testing.assert_array_equal(of_rounded["kernel"], of_wide["kernel"])


def test_decays_that_bfloat16_would_lose_are_refused():
    with pytest.raises(
        BadInput, match=r"b2=0\.999 with moments in bfloat16: .* choose b2=0\.99 or less \(the second of --betas\)"
    ):
        adamw(1e-3, moments="bfloat16")
    adamw(1e-3, b2=0.99, moments="bfloat16")
    adamw(1e-3, b2=0.999, moments="first-bfloat16")
    with pytest.raises(BadInput, match=r"b1=0\.995 with moments in bfloat16: .*, or moments in float32$"):
        adamw(1e-3, b1=0.995, moments="first-bfloat16")
    with pytest.raises(BadInput, match="moments='float16' is unknown"):
        adamw(1e-3, moments="float16")


@pytest.mark.parametrize("shape", [(12, 12), (6, 20), (20, 6)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_singular_values(shape):
    matrices = np.random.default_rng(0).normal(size=(3, *shape)).astype("f4") * 1e-4
    found = np.asarray(orthogonalised(jnp.asarray(matrices)))
    for before, after in zip(matrices, found, strict=True):
        u, _, v = np.linalg.svd(before, full_matrices=False)
        values = u.T @ after @ v.T
        np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-4)
        assert np.diag(values).min() > 0.6 and np.diag(values).max() < 1.25
    assert (np.asarray(orthogonalised(jnp.zeros((4, 3)))) == 0).all()


def test_how_far_orthogonalised_moves_singular_values():
    before = np.geomspace(1e-4, 1, 400, dtype="f4")  # and one more, so that the norm is 1 within rounding
    matrices = np.zeros((400, 2, 2), "f4")
    matrices[:, 0, 0], matrices[:, 1, 1] = before, np.sqrt(1 - before**2)
    after = np.asarray(orthogonalised(jnp.asarray(matrices)))[:, 0, 0]
    large = before > 1 / 500
    assert 0.68 < after[large].min() < 0.69 and 1.2 < after[large].max() < 1.21
    assert (after < 500 * before).all()


@pytest.mark.parametrize(
    ("module", "features", "said"), [("gate", (2, 4), "has 3 dimensions"), ("query", (8,), "has 2 dimensions")]
)
def test_muon_refuses_a_matrix_whose_name_tells_of_another_one(module, features, said):
    """A gate of each head beside that of the feed-forward network: 2 x 4 would have been taken for a matrix."""
    params = {"group_0": {"block_0": {"attention": {module: {"kernel": jnp.zeros((3, 8, *features))}}}}}
    with pytest.raises(BadInput, match=f"group_0/block_0/attention/{module}/kernel {said} in a layer, and layers.axes"):
        muon(1e-3).init(params)


def test_muon_keeps_one_moment_of_matrices_in_the_type_asked_for():
    """Heads, of tokens or of classes, are no matrices of layers."""
    config = GPT2Config(vocab_size=11, hidden_size=4, num_hidden_layers=2, num_attention_heads=2)
    params = draw_variables(config)["params"]
    matrices = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path))
    params |= {"lm_head": {"kernel": jnp.zeros((4, 11))}, "score": {"kernel": jnp.zeros((4, 3))}}
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = muon(1e-3, b2=0.95, moments="bfloat16").init(params)
    held = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in held} == {jnp.dtype("bfloat16")}
    assert sum(leaf.size for leaf in held) == 2 * total - matrices
    state = muon(1e-3, moments="first-bfloat16").init(params)
    wide = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.dtype == jnp.float32)
    assert wide == total - matrices  # AdamW's second moments
    with pytest.raises(BadInput, match="with moments in bfloat16: what one update changes"):
        muon(1e-3, moments="bfloat16")
    for name in ("momentum", "b1"):
        with pytest.raises(BadInput, match=rf"^{name}=0\.995 with moments in bfloat16"):
            muon(1e-3, moments="first-bfloat16", **{name: 0.995})


@pytest.mark.parametrize("make", [adamw, muon])
def test_rates_epsilon_and_types_are_those_that_are_given(make):
    """Of what is no matrix of a layer: as in optax's Adam."""
    rng = np.random.default_rng(0)
    params = {"group_0": {"block_0": {"up": {"kernel": jnp.zeros((1, 4, 6))}}}, "final_norm": {"scale": jnp.zeros(3)}}
    gradients = [jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "f4"), params) for _ in range(3)]

    def last_update(optimizer):
        state = optimizer.init(params)
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, params)
        return update

    given = {"b1": 0.6, "b2": 0.7, "epsilon": 0.5, "weight_decay": 0.0, "clip": None}
    update, expected = last_update(make(0.1, **given)), last_update(optax.adam(0.1, b1=0.6, b2=0.7, eps=0.5))
    np.testing.assert_allclose(update["final_norm"]["scale"], expected["final_norm"]["scale"], rtol=1e-5)
    if make is muon:
        wide, narrow = (jax.tree.leaves(last_update(muon(0.1, **given, dtype=of)))[1] for of in ("float32", "bfloat16"))
        assert 1e-3 < np.abs(wide - narrow).max() / np.abs(wide).max() < 0.2


def test_rates_by_layer_as_the_page_has_them():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    mark = "<!-- executed by tests/training/test_optimizer.py -->"
    (code,) = re.findall(rf"{re.escape(mark)}\n```python\n(.*?)```", page, re.DOTALL)
    shown: dict = {}
    exec(compile(code, "docs/training.md", "exec"), shown)
    params = init(GPT2Config(vocab_size=11, hidden_size=4, num_hidden_layers=3, num_attention_heads=2))["params"]
    gradient = jax.tree.map(jnp.ones_like, params)
    scale = shown["rates_by_layer"](0.5)
    updates, _ = scale.update(gradient, scale.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        by_layer = [0.25, 0.5, 1.0] if "group_0" in str(path) else [1.0] * len(update)
        assert [float(layer.max()) for layer in update] == by_layer
        assert [float(layer.min()) for layer in update] == by_layer
    shown["optimizer"].update(gradient, shown["optimizer"].init(params), params)
