"""Adapters: what they compute, where they go, what they merge to, and that nothing of a matrix's size is formed."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llmq_jax.errors import BadInput
from llmq_jax.interop.peft import module_names
from llmq_jax.layers import fresh_adapters, lora
from llmq_jax.layers.expert_dispatch import dispatch
from llmq_jax.layers.expert_weights import ExpertWeights
from llmq_jax.layers.experts_apart import by_expert
from llmq_jax.layers.fresh_adapters import add_adapters
from llmq_jax.layers.linear import by_output
from llmq_jax.layers.lora import LoRA
from llmq_jax.layers.recomputation import POLICIES
from llmq_jax.models import (
    DeepSeekV3Config,
    Gemma3Config,
    GPT2Config,
    Llama3Config,
    MixtralConfig,
    build,
    init,
    override,
)
from llmq_jax.objectives import NextToken

SIZES = {
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 28,
}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}),
    "llama": Llama3Config(**SIZES, num_key_value_heads=2),
    "gemma": Gemma3Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=("sliding_attention", "sliding_attention", "full_attention"),
    ),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    "deepseek": DeepSeekV3Config(
        **SIZES,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=9,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=12,
        num_nextn_predict_layers=0,
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 13)).astype(np.int32)
VARIANTS = {
    "lora": LoRA(rank=3),
    "rslora on some layers": LoRA(rank=4, alpha=5.0, use_rslora=True, layers=(0, 2)),
    "dora": LoRA(rank=2, variant="dora", layers=(1, 2), targets=("attention",)),
    "lora-xs": LoRA(rank=4, variant="lora-xs"),
    "tinylora": LoRA(rank=2, variant="tinylora", numbers=5),
    "tied tinylora": LoRA(rank=2, variant="tinylora", numbers=5, tied=True),
}


# Of one architecture all variants; of the others what they alone have: biases and one matrix for queries, keys and
# values; several groups of layers; stacked experts; latents, which decoding absorbs. (All of them beside PEFT's:
# tests/parity/test_peft.py.)
CASES = [
    *(("llama", name) for name in VARIANTS),
    ("gpt2", "rslora on some layers"),
    ("gemma", "rslora on some layers"),
    *(("mixtral", name) for name in ("rslora on some layers", "tied tinylora")),
    *(("deepseek", name) for name in ("rslora on some layers", "dora", "tied tinylora")),
]


@pytest.fixture(scope="module", params=CONFIGS)
def base(request):
    config = CONFIGS[request.param]
    return build(config), drawn(config)


def moved(variables, seed=1, size=0.3):
    """The same with other adapters than fresh ones."""
    leaves, structure = jax.tree.flatten(variables["lora"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [size * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return {**variables, "lora": jax.tree.unflatten(structure, jax.tree.map(jnp.add, leaves, noise))}


@cache
def drawn(config):
    return init(config)


@partial(jax.jit, static_argnums=0)
def apply(model, variables, key=None):
    return model.apply(variables, TOKENS, rngs=None if key is None else {"dropout": key})


@partial(jax.jit, static_argnums=0)
def decode(model, outside, layers, tokens, positions, caches):
    output = model.decode(outside, layers, tokens, positions, caches)
    return model.apply(outside, output.hidden, method="unembed"), output.caches


def largest_difference(a, b):
    both = zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (a, b)), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in both)


@pytest.mark.parametrize("depth", [300, 11008])
def test_a_fresh_magnitude_multiplies_by_one_though_another_program_measured_it(depth):
    kernel = np.random.default_rng(0).normal(size=(depth, 40)).astype(np.float32)
    nothing = jnp.zeros((depth, 2)), jnp.zeros((2, 40))

    def ratio(magnitude):
        magnitude = jnp.asarray(magnitude)
        return lora.magnitude_ratio(jnp.asarray(kernel), *nothing, {"magnitude": magnitude}, {"scale": jnp.ones(())})

    lengths = np.linalg.norm(kernel, axis=0)  # a sum in another order
    np.testing.assert_array_equal(ratio(lengths), 1)
    np.testing.assert_allclose(jax.grad(lambda m: ratio(m).sum())(jnp.asarray(lengths)), 1 / lengths, rtol=5e-6)
    np.testing.assert_allclose(ratio(lengths * np.float32(1.0001)) - 1, 1e-4, rtol=0.1)


@pytest.mark.parametrize(("base", "name"), CASES, indirect=["base"])
@pytest.mark.product("adapters")
def test_adapters_change_nothing_at_first_and_merge_to_what_they_compute(base, name):
    model, variables = base
    fresh = add_adapters(variables, model.layer_paths(), VARIANTS[name])
    reference = np.asarray(apply(model, variables))
    # Zeros are added, and a DoRA multiplies by 1; but another program rounds elsewhere.
    np.testing.assert_allclose(apply(model, fresh), reference, atol=2e-7, rtol=0)

    adapted = moved(fresh)
    expected = np.asarray(apply(model, adapted))
    assert np.abs(expected - reference).max() > 0.01
    merged = lora.merge(lora.spread(adapted))
    assert merged.keys() == variables.keys()
    np.testing.assert_allclose(apply(model, merged), expected, atol=5e-6, rtol=0)
    parted = lora.unmerge(merged, adapted)
    assert largest_difference(parted["params"], variables["params"]) < 1e-6
    assert largest_difference(parted["lora"], adapted["lora"]) == 0  # numbers that matrices share, once


@pytest.mark.parametrize(("base", "name"), CASES, indirect=["base"])
@pytest.mark.product("adapters")
def test_decoding_has_the_adapters_too(base, name, monkeypatch):
    """Merged where that is exact, else beside the matrices, whose layout differs from that of training."""
    model, variables = base
    adapted = moved(add_adapters(variables, model.layer_paths(), VARIANTS[name]))
    expected = np.asarray(apply(model, adapted))
    assert not any("lora" in layer for layer in model.slice_layers(adapted)[1])
    monkeypatch.setattr(type(model), "computes_in_float32", lambda model, variables: False)
    outside, layers = model.slice_layers(adapted, lambda tree: by_expert(by_output(tree)))
    assert any("lora" in layer for layer in layers)
    assert ("'ratio'" in str(jax.tree.structure(layers))) == (name == "dora")  # no pass measures columns again
    caches = model.slice_caches(model.create_caches(2, 16, jnp.float32))
    for place in range(6):
        logits, caches = decode(model, outside, layers, TOKENS[:, [place]], np.full((2, 1), place), caches)
        np.testing.assert_allclose(np.asarray(logits)[:, 0], expected[:, place], atol=3e-5, rtol=0)


def test_adapters_are_merged_where_products_stay_in_float32(monkeypatch):
    """Elsewhere what answers would be another policy than what learns."""
    config = CONFIGS["llama"]
    wide = drawn(config)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    for dtype, exactly in ((None, (True, False)), ("float32", (True, False)), ("bfloat16", (False, False))):
        assert tuple(build(config, dtype=dtype).computes_in_float32(given) for given in (wide, narrow)) == exactly
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not build(config).computes_in_float32(wide)


LORA_OF_ONE, DORA_OF_ONE = LoRA(rank=2, layers=(1,)), LoRA(rank=2, layers=(1,), variant="dora", targets="attention")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("base", "spec"),
    [("llama", DORA_OF_ONE), ("gemma", LORA_OF_ONE), ("mixtral", LORA_OF_ONE)],
    indirect=["base"],
    ids=["llama", "gemma", "mixtral"],
)
def test_layers_that_were_not_chosen_get_no_gradient(base, spec):
    """Of one stack, of several, and of one of experts."""
    model, variables = base
    adapted = moved(add_adapters(variables, model.layer_paths(), spec))

    def loss(trained):
        return jnp.square(model.apply({**adapted, "lora": trained}, TOKENS)).mean()

    paths = dict(enumerate(model.layer_paths()))
    gradients = flatten_dict(jax.jit(jax.grad(loss))(adapted["lora"]))
    assert gradients
    for path, gradient in gradients.items():
        for block, repeat in paths.values():
            if path[:2] == block:
                layer = next(i for i, path_of in paths.items() if path_of == (block, repeat))
                assert np.any(gradient[repeat]) == (layer == 1), path


def products(jaxpr):
    """The shapes of all matrix products in a program, those of its loops and branches among them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from (tuple(out.aval.shape) for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def matrices_formed(base, spec):
    """How many products of the shapes of weight matrices the gradient of a loss takes. 26 tokens and blocks of 16, 32,
    48 and 52 of them are no width of any model here."""
    model, variables = base
    if spec is not None:
        variables = add_adapters(variables, model.layer_paths(), spec)
    trained = "params" if spec is None else "lora"
    objective = NextToken(model)
    batch = {"tokens": jnp.array(TOKENS), "targets": jnp.array(TOKENS), "mask": jnp.ones(TOKENS.shape)}

    def loss(tree):
        return objective.loss({**variables, trained: tree}, batch, {"loss": jnp.float32(26)}, None)[0]

    names = ("kernel", "up_kernel", "down_kernel", "embedding")
    shapes = set()
    for path, leaf in flatten_dict(variables["params"]).items():
        if path[-1] in names and "router" not in path:
            stack = path[0].startswith("group_") + (path[-1] in names[1:3])
            flat = leaf.shape[stack], int(np.prod(leaf.shape[stack + 1 :]))
            shapes |= {flat, flat[::-1], leaf.shape[stack:]}
    return sum(shape in shapes for shape in products(jax.make_jaxpr(jax.grad(loss))(variables[trained]).jaxpr))


@pytest.mark.exhaustive
def test_no_gradient_of_a_matrix_is_formed(base):
    assert matrices_formed(base, LoRA(rank=3)) == 0
    assert matrices_formed(base, None) >= 4  # the same count sees those of full training


def test_the_linear_layer_drops_the_adapters_input_alone():
    model, variables = build(CONFIGS["llama"]), drawn(CONFIGS["llama"])
    fresh = add_adapters(variables, model.layer_paths(), LoRA(rank=3, dropout=0.5))
    first, second = jax.random.split(jax.random.key(0))
    np.testing.assert_allclose(apply(model, fresh, first), apply(model, variables), atol=2e-7)
    adapted = moved(fresh)
    dropped = [np.asarray(apply(model, adapted, key)) for key in (first, second)]
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3
    np.testing.assert_array_equal(apply(model, adapted), apply(model, adapted))
    # On average over masks, a linear layer gives what it gives without dropout.
    x, kernel = jnp.ones((1, 8)), jnp.zeros((8, 5))
    factors = {"A": jnp.ones((8, 2)), "B": jnp.ones((2, 5))}
    fixed = {"scale": jnp.float32(1), "dropout": jnp.float32(0.25)}
    keys = jax.random.split(jax.random.key(2), 2000)
    over_masks = jax.jit(jax.vmap(lambda key: lora.adapted(x, x @ kernel, kernel, factors, fixed, key)))
    mean = np.asarray(over_masks(keys)).mean(0)
    np.testing.assert_allclose(mean, lora.adapted(x, x @ kernel, kernel, factors, fixed), rtol=0.02)
    # PEFT's folders may say that all is dropped.
    fixed["dropout"] = jnp.float32(1)
    whole = jax.grad(lambda x: lora.adapted(x, x @ kernel, kernel, factors, fixed, keys[0]).sum())(x)
    np.testing.assert_array_equal(whole, 0)


def test_fresh_adapters_are_drawn_as_the_papers_and_peft_say():
    model, variables = build(CONFIGS["llama"]), drawn(CONFIGS["llama"])

    def at_key_and_value(**fields):
        adapted = add_adapters(variables, model.layer_paths(), LoRA(targets=("key", "value"), **fields))
        return [lora.adapters(adapted)["group_0", "block_0", "attention", name, "kernel"] for name in ("key", "value")]

    (key, fixed), (value, _) = at_key_and_value(rank=3)
    assert (fixed["scale"] == 2).all()
    assert not (key["A"] == value["A"]).any(), "each matrix draws its own"
    assert 0.95 / 24**0.5 < np.abs(key["A"]).max() <= 1 / 24**0.5
    (middle, fixed), _ = at_key_and_value(rank=4, variant="lora-xs")
    rows = fixed["B"].reshape(3, 4, -1)
    np.testing.assert_allclose(rows @ rows.mT, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5)  # Vᵀ
    values = np.linalg.norm(fixed["A"], axis=1)  # Σ [3, 4]
    assert not middle["M"].any(), "which the paper draws from normal(1e-5)"
    (numbers, tiny), _ = at_key_and_value(rank=4, variant="tinylora")
    assert numbers["v"].shape == (3, 64) and np.std(tiny["P"]) == pytest.approx(4**-0.5, rel=0.05)
    roots = np.sqrt(values)  # as in PEFT: half of Σ on either side
    np.testing.assert_allclose(tiny["A"] * roots[:, None], fixed["A"], atol=1e-5)
    np.testing.assert_allclose(tiny["B"].reshape(3, 4, -1), rows * roots[..., None], atol=1e-5)


def an_adapter(kernel, variant="dora"):
    """(What trains, what is fixed) of a fresh one at a matrix."""
    variables = {"params": {"lm_head": {"kernel": kernel}}}
    adapted = add_adapters(variables, [], LoRA(rank=1, variant=variant, targets="lm_head"))
    return lora.adapters(adapted)["lm_head", "kernel"]


@pytest.mark.parametrize("variant", ["dora", "tinylora"])
def test_merging_multiplies_in_float32_on_a_gpu_too(variant):
    """Where JAX rounds to TF32 unless told otherwise: merged weights stay."""
    kernel = jnp.ones((3, 2))
    lowered = lora._merged.lower(kernel, *an_adapter(kernel, variant)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) > 1 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_dora_at_a_column_of_zeros():
    """It starts at the matrix as it is, and learns: 0 / 0 would make all of it NaN."""
    x, kernel = jnp.asarray([[1.0, 2.0, 3.0]]), jnp.asarray([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    trained, fixed = an_adapter(kernel)

    def product(trained):
        return lora.adapted(x, x @ kernel, kernel, trained, fixed)

    np.testing.assert_allclose(product(trained), x @ kernel, atol=1e-6)
    gradients = jax.grad(lambda trained: product(trained).sum())(trained)
    assert all(np.isfinite(leaf).all() for leaf in gradients.values()) and np.abs(gradients["B"]).min() > 0.1


def test_what_a_dora_stretches_by_is_not_rounded_to_bfloat16():
    """It has no number between 1 and 1.0078. Products are rounded: on average they grow as they should."""
    x = jnp.asarray(np.exp2(np.random.default_rng(0).uniform(0, 1, (5000, 1))), jnp.bfloat16)
    kernel = jnp.ones((1, 1), jnp.bfloat16)
    trained, fixed = an_adapter(kernel)
    found = lora.adapted(x, x @ kernel, kernel, {**trained, "magnitude": 1.003 * trained["magnitude"]}, fixed)
    assert found.dtype == jnp.bfloat16
    assert np.mean(np.float64(found) / np.float64(x)) == pytest.approx(1.003, abs=3e-4)
    # Nor does a layer keep anything in float32 for the backward pass.
    adapted = jax.checkpoint(partial(lora.adapted, fixed=fixed), policy=POLICIES["none"])
    backward = jax.vjp(lambda x, trained: adapted(x, x @ kernel, kernel, trained), x, trained)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(backward) if leaf.size >= x.size} == {jnp.bfloat16.dtype}


def test_what_remat_keeps_of_an_adapted_product():
    """The results of products, as "dots" and "none" do: x W alone, and not what the adapter adds to it, which is as
    large."""
    kernel = jnp.ones((3, 7))
    trained, fixed = an_adapter(kernel, "lora")

    def adapted(x, trained):
        return jnp.sin(lora.adapted(x, x @ kernel, kernel, trained, fixed))

    for policy in (jax.checkpoint_policies.dots_saveable, POLICIES["none"]):
        kept = jax.tree.leaves(jax.vjp(jax.checkpoint(adapted, policy=policy), jnp.ones((5, 3)), trained)[1])
        assert sorted(leaf.shape for leaf in kept if leaf.shape[:1] == (5,)) == [(5, 1), (5, 3), (5, 7)]


@pytest.mark.parametrize("capacity_or_name", ["blocks", "ragged", "grouped", "capacity"])
@pytest.mark.parametrize("sides", [("up",), ("down",), ("up", "down")])
@pytest.mark.product
def test_experts_with_adapters_are_the_same_however_tokens_come_to_them(capacity_or_name, sides):
    keys = iter(jax.random.split(jax.random.key(0), 20))
    tokens, experts, width, hidden, rank = 37, 5, 8, 6, 3

    def draw(*shape):
        return 0.5 * jax.random.normal(next(keys), shape)

    x, ids = draw(tokens, width), jax.random.randint(next(keys), (tokens, 2), 0, experts + 1)
    weights = jax.nn.softmax(draw(tokens, 2))
    low_rank = {
        "up": (draw(experts, width, rank), draw(experts, rank, 2, hidden)),
        "down": (draw(experts, hidden, rank), draw(experts, rank, width)),
    }
    frozen = {"up": draw(experts, width, 2, hidden), "down": draw(experts, hidden, width)}
    biases = {"up_bias": draw(experts, 2, hidden), "down_bias": draw(experts, width)}
    learning = biases | {f"{side}_low_rank": low_rank[side] for side in sides}
    learning |= {name: leaf for name, leaf in frozen.items() if name not in sides}

    def loss(learning, x, name):
        weights_of_experts = ExpertWeights(**frozen | learning)
        mixed, _ = dispatch(
            x, ids, weights, weights_of_experts, lambda parts: jax.nn.silu(parts[..., 0, :]) * parts[..., 1, :],
            name, 2 * tokens if name == "capacity" else None,
        )  # fmt: skip
        return jnp.sin(mixed).sum(), mixed

    value = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (_, expected), reference = value(learning, x, "dense")
    (_, mixed), gradients = value(learning, x, capacity_or_name)
    np.testing.assert_allclose(mixed, expected, atol=1e-4)
    for found, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5 * np.abs(right).max(), rtol=0)


def test_experts_that_stay_as_they_are_cost_no_gradient():
    """Targets elsewhere leave experts without adapters: nothing of theirs is formed then either."""
    config = CONFIGS["mixtral"]
    base = build(config), drawn(config)
    assert matrices_formed(base, LoRA(rank=3, targets="attention")) == 0


def test_factors_of_the_largest_singular_values():
    rng = np.random.default_rng(0)
    for shape in ((2, 9, 6), (2, 6, 9)):
        w = rng.normal(size=shape).astype(np.float32)
        left, values, right = fresh_adapters._largest_singular(w, 3)
        np.testing.assert_allclose(values, np.linalg.svd(w, compute_uv=False)[:, :3], rtol=1e-6)
        u, s, vt = np.linalg.svd(w)
        best = (u[..., :3] * s[:, None, :3]) @ vt[:, :3]
        np.testing.assert_allclose((left * values[:, None]) @ right, best, atol=1e-5)
    # Of a matrix of rank 2 the third factors are zeros, not infinite.
    w = (rng.normal(size=(9, 2)) @ rng.normal(size=(2, 6))).astype(np.float32)
    left, values, right = fresh_adapters._largest_singular(w, 3)
    assert values[2] == 0 and np.isfinite(left).all() and np.isfinite(right).all()
    np.testing.assert_allclose((left * values) @ right, w, atol=1e-5)


def test_targets_are_named_by_groups_our_names_or_those_of_transformers():
    model, variables = build(CONFIGS["deepseek"]), drawn(CONFIGS["deepseek"])
    aliases = module_names(CONFIGS["deepseek"])

    def inside(*targets):
        found = lora.adapters(add_adapters(variables, model.layer_paths(), LoRA(rank=1, targets=targets), aliases))
        return {"/".join(path[2:] if path[-1] != "kernel" else path[2:-1]) or path[0] for path in found}

    attention = {f"attention/{name}" for name in ("query_down", "query_up", "latent_down", "latent_up", "out")}
    dense, shared = ({f"{where}/{name}" for name in ("gate", "up", "down")} for where in ("mlp", "moe/shared"))
    experts = {"moe/up_kernel", "moe/down_kernel"}
    assert inside("attention") == attention
    assert inside("mlp") == dense | shared | experts
    assert inside("all-linear") == attention | dense | shared | experts
    assert inside("kv_b_proj", "lm_head") == {"attention/latent_up", "lm_head"}
    assert inside("mlp.down_proj") == {"mlp/down"}
    assert inside("down_proj") == {"mlp/down", "moe/shared/down", "moe/down_kernel"}
    assert inside("latent_*", "router") == {"attention/latent_down", "attention/latent_up", "moe/router"}
    assert inside("kv_*_proj*") == {"attention/latent_down", "attention/latent_up"}
    assert inside("mlp.*_proj", "self_attn.o*") == {"mlp/gate", "mlp/up", "mlp/down", "attention/out"}


def test_what_trains_is_counted_in_the_layers_that_have_it():
    model, variables = build(CONFIGS["llama"]), drawn(CONFIGS["llama"])

    def count(**fields):
        return lora.trained_numbers(add_adapters(variables, model.layer_paths(), LoRA(**fields)))

    assert count(rank=2, targets="query") == 3 * 2 * (24 + 24)
    assert count(rank=2, targets="query", layers=(1,)) == 2 * (24 + 24)
    assert count(rank=2, targets="query", variant="dora") == 3 * (2 * (24 + 24) + 24)
    assert count(rank=2, variant="lora-xs") == 3 * 7 * 2 * 2
    assert count(rank=2, variant="tinylora", numbers=5) == 3 * 7 * 5
    assert count(rank=2, variant="tinylora", numbers=5, tied=True) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"alpha": float("inf")}, "alpha=inf must be positive, and finite"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"tied": True}, "tied=True has no effect but on tinylora"),
        ({"numbers": 3}, "numbers=3 has no effect but on tinylora"),
        ({"targets": ()}, "targets=() names no matrix"),
        ({"targets": "querry"}, "'querry' matches no matrix; there are all-linear, attention, mlp, attention/key"),
        ({"targets": "atention"}, "'atention' matches no matrix; did you mean attention?"),
        ({"layers": ()}, "layers=() names no layer"),
        ({"layers": (3,)}, "layer 3 does not exist; the model has layers 0 to 2"),
        ({"rank": 25}, "rank=25 is above that of group_0/block_0/attention/key/kernel, a matrix of rank 12"),
        ({"dropout": 0.1, "targets": "moe/*"}, "dropout=0.1 does not act on stacked experts"),
        ({"variant": "dora"}, "variant='dora' does not act on stacked experts"),
        ({"dropout": 0.1, "targets": "lm_head"}, "dropout=0.1 does not act on the head (lm_head/kernel)"),
        ({"whole": "lm_haed"}, "whole='lm_haed' is no embedding or head of this model; choose from token_embedding"),
        ({"whole": ("score",)}, "whole='score' is no embedding or head of this model; choose from token_embedding"),
        ({"whole": ("lm_head",), "targets": "lm_head"}, "whole='lm_head' has an adapter among the targets; leave it"),
    ],
)
def test_bad_adapters_are_refused_in_one_line(fields, message):
    config = CONFIGS["mixtral"]
    with pytest.raises(BadInput) as error:
        add_adapters(drawn(config), build(config).layer_paths(), LoRA(**fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("targets", [1], "LoRA: targets=[1] must be a name, or several: ('query', 'value')"),
        ("variant", "DoRA", "LoRA: variant='DoRA' is unknown; did you mean dora?"),
        ("variant", "pissa", "LoRA: variant='pissa' is unknown; choose from lora, dora, lora-xs, tinylora"),
        ("variant", None, "LoRA: variant=None is unknown; choose from lora, dora, lora-xs, tinylora"),
        ("layers", 1, "LoRA: layers=1 must be a sequence: (0, 1), or (1,) for one layer"),
        ("layers", ["1"], "LoRA: layers=['1'] must be a sequence of whole numbers: (0, 1)"),
        ("whole", None, "LoRA: whole=None must be a name, or several: ('token_embedding', 'lm_head')"),
    ],
)
def test_fields_of_another_type_are_refused(field, value, message):
    """Set afterwards: the annotations of the class are checked in these tests."""
    spec = LoRA()
    object.__setattr__(spec, field, value)
    with pytest.raises(BadInput) as error:
        spec.__post_init__()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("fields", "whole", "message"),
    [
        ({"tie_word_embeddings": True}, "lm_head", "whole='lm_head' is one matrix with the embedding in this model"),
        ({"labels": ("a", "b")}, "score", "whole='score' is a classifier's head, which trains anyway; leave it out"),
        ({"labels": ("a", "b")}, "lm_head", "'lm_head' is no embedding or head of this model; choose from token_e"),
        ({}, "q_proj", "whole='q_proj' is no embedding or head of this model; choose from token_embedding, lm_head"),
    ],
)
def test_what_cannot_train_whole_is_refused_in_one_line(fields, whole, message):
    config = override(CONFIGS["llama"], **fields)
    with pytest.raises(BadInput) as error:
        add_adapters(drawn(config), build(config).layer_paths(), LoRA(rank=1, whole=whole), module_names(config))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_trains_whole_has_our_names_or_those_of_transformers(name):
    config = CONFIGS[name]
    model, variables, aliases = build(config), drawn(config), module_names(config)
    theirs = {"gpt2": "wte"}.get(name, "embed_tokens")
    for given in (theirs, "token_embedding", (theirs, "token_embedding")):
        adapted = add_adapters(variables, model.layer_paths(), LoRA(rank=1, whole=given), aliases)
        assert lora.trained_whole(adapted) == {"token_embedding"}
    with pytest.raises(BadInput, match=rf"LoRA: '{theirs}' matches no matrix; there are "):
        add_adapters(variables, model.layer_paths(), LoRA(rank=1, targets=theirs), aliases)


def test_a_pattern_that_the_chosen_layers_lack_is_refused():
    model, variables = build(CONFIGS["deepseek"]), drawn(CONFIGS["deepseek"])
    with pytest.raises(BadInput, match=r"layers 0 have no moe/\*; leave it out"):
        add_adapters(variables, model.layer_paths(), LoRA(targets=("attention", "moe/*"), layers=(0,), rank=2))


@pytest.mark.exhaustive
def test_a_base_in_bfloat16_keeps_its_type():
    model, variables = build(CONFIGS["mixtral"]), drawn(CONFIGS["mixtral"])
    variables = {"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])}
    adapted = moved(add_adapters(variables, model.layer_paths(), LoRA(rank=2)), size=1.0)
    expected = apply(model, adapted)
    merged = lora.merge(adapted)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    precise = {**adapted, "params": jax.tree.map(lambda x: x.astype(jnp.float32), adapted["params"])}
    reference = apply(model, precise)
    moved_by = np.abs(reference - apply(model, {"params": precise["params"]})).max()
    for found in (expected, apply(model, merged)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, reference, atol=0.25 * moved_by, rtol=0)


@pytest.mark.exhaustive
def test_modules_of_multi_token_prediction_stay_as_they_are():
    config = override(CONFIGS["deepseek"], num_nextn_predict_layers=1)
    model, variables = build(config), drawn(config)
    adapted = moved(add_adapters(variables, model.layer_paths(), LoRA(rank=2)))
    assert all(path[0].startswith("group_") for path in lora.adapters(adapted))
    ahead = jax.jit(lambda variables: model.apply(variables, TOKENS, method="mtp_logits"))
    for found, expected in zip(ahead(lora.merge(adapted)), ahead(adapted), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)


def test_what_was_never_merged_is_not_unmerged():
    model, variables = build(CONFIGS["llama"]), drawn(CONFIGS["llama"])
    adapted = add_adapters(variables, model.layer_paths(), LoRA(rank=2))
    with pytest.raises(BadInput, match="has adapters beside its matrices, so that they are not merged"):
        lora.unmerge(adapted, adapted)
    shallow = drawn(override(CONFIGS["llama"], num_hidden_layers=1))
    message = (
        r"adapters at group_0/block_0/attention/key/kernel of a matrix \[3, 24, .*\], where this model has \[1, 24"
    )
    with pytest.raises(BadInput, match=message):
        lora.unmerge(shallow, adapted)
    dora = add_adapters(variables, model.layer_paths(), LoRA(rank=2, targets="value", variant="dora"))
    dora["lora"] = jax.tree.map(jnp.zeros_like, dora["lora"])
    with pytest.raises(BadInput, match="adapters at group_0/block_0/attention/value/kernel have a magnitude of 0"):
        lora.unmerge(lora.merge(dora), dora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dora_is_unmerged_beside_the_base_that_it_was_merged_into(dtype):
    """Merging takes the lengths of columns away; another base's are other lengths. LoRA takes none away."""
    model, variables = build(CONFIGS["llama"]), drawn(CONFIGS["llama"])
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    for spec in (DORA_OF_ONE, LORA_OF_ONE):
        adapted = moved(add_adapters(variables, model.layer_paths(), spec), size=0.1)
        merged = lora.merge(adapted)
        parted = lora.unmerge(merged, adapted)
        assert largest_difference(parted["params"], variables["params"]) < {"float32": 1e-6, "bfloat16": 1e-3}[dtype]
        first_layer = jax.tree.map(lambda leaf: leaf.at[0].multiply(1.5), variables["params"]["group_0"])
        elsewhere = {**adapted, "params": {**variables["params"], "group_0": first_layer}}  # where there is no adapter
        assert largest_difference(lora.unmerge(merged, elsewhere)["params"], parted["params"]) == 0
        for other in (merged["params"], jax.tree.map(lambda leaf: leaf * 1.05, variables["params"])):
            another = {**adapted, "params": other}
            if spec is LORA_OF_ONE:
                again = lora.unmerge(merged, another)
                assert largest_difference(again["params"], parted["params"]) == 0
                continue
            with pytest.raises(
                BadInput, match=r"adapters at group_0/block_0/attention/\w+/kernel, a DoRA, were merged into an"
            ):
                lora.unmerge(merged, another)


def test_a_model_with_adapters_takes_no_others():
    model, variables = build(CONFIGS["llama"]), drawn(CONFIGS["llama"])
    adapted = add_adapters(variables, model.layer_paths(), LoRA())
    with pytest.raises(BadInput, match="has adapters already"):
        add_adapters(adapted, model.layer_paths(), LoRA())
