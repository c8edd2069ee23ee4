import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.generation.generate import generate
from llmq_jax.generation.sampling import Sampler
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.caches import FullCache, RingCache
from llmq_jax.layers.linear import by_output
from llmq_jax.models import abstract_variables, build, init, override, preset
from llmq_jax.models.gemma import GLOBAL, LOCAL, Gemma2Config, Gemma3Config
from llmq_jax.models.layer_groups import repeating_patterns
from llmq_jax.training.roles import roles
from tests.models.compiled import apply, decode
from tests.weights import draw_variables

SIZES = {
    "vocab_size": 29,
    "max_position_embeddings": 64,
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 20,
    "sliding_window": 5,
    "query_pre_attn_scalar": 6,
    "initializer_range": 0.2,
}
# Groups of both kinds: (local, global) twice and a local one.
GEMMA3 = Gemma3Config(
    **SIZES, num_hidden_layers=5, layer_types=(LOCAL, GLOBAL) * 2 + (LOCAL,), rope_parameters={"rope_theta": 1000.0}
)
GEMMA2 = Gemma2Config(**SIZES, num_hidden_layers=3, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 40)).astype(np.int32)


@pytest.fixture(scope="module", params=[GEMMA3, GEMMA2], ids=["gemma 3", "gemma 2"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def variables(config):
    return draw_variables(config)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gemma3-270m", 268_098_176),
        ("gemma3-1b", 999_885_952),
        # Published with the vision tower (416,866,032) and the projector (1152 D + 1152): 4,300,079,472,
        # 12,187,325,040 and 27,432,406,640.
        ("gemma3-4b", 4_300_079_472 - 416_866_032 - 1152 * 2561),
        ("gemma3-12b", 12_187_325_040 - 416_866_032 - 1152 * 3841),
        ("gemma3-27b", 27_432_406_640 - 416_866_032 - 1152 * 5377),
        ("gemma2-2b", 2_614_341_888),
        ("gemma2-9b", 9_241_705_984),
        ("gemma2-27b", 27_227_128_320),
    ],
)
def test_presets_have_the_published_sizes(name, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(preset(name)))) == parameters


@pytest.mark.exhaustive
def test_initialisation():
    sizes = {"vocab_size": 2000, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 128}
    params = init(Gemma3Config(**sizes, num_hidden_layers=4, layer_types=(LOCAL, GLOBAL) * 2))["params"]
    kernels = [params["token_embedding"]["embedding"]]
    for block in params["group_0"].values():
        kernels += [
            leaf["kernel"] for part in ("attention", "mlp") for leaf in block[part].values() if "kernel" in leaf
        ]
        norms = [leaf for name, leaf in block.items() if name.endswith("_norm")]
        norms += [leaf for name, leaf in block["attention"].items() if name.endswith("_norm")]
        assert len(norms) == 6
        for norm in [*norms, params["final_norm"]]:
            assert norm.keys() == {"scale"} and (norm["scale"] == 0).all()
    assert len(kernels) == 1 + 2 * 7
    for kernel in kernels:
        assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.04)


@pytest.mark.exhaustive
def test_a_laptop_s_preset_starts_from_chance():
    """Bytes, in the type of a GPU; its window matters."""
    config = preset("gemma3-10m")
    assert config.sliding_window < config.max_position_embeddings and GLOBAL in config.layer_kinds
    config = override(config, num_hidden_layers=2)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 16)).astype(np.int32)
    logits = apply(build(config, dtype="bfloat16"), init(config), tokens)
    assert logits.dtype == jnp.float32
    losses = -jax.nn.log_softmax(logits[:, :-1])
    loss = jnp.take_along_axis(losses, tokens[:, 1:, None], axis=-1).mean()
    assert float(loss) == pytest.approx(np.log(257), abs=0.3)


# Layers of two kinds.


@pytest.mark.parametrize(
    ("kinds", "patterns"),
    [
        ("lllllg" * 4 + "ll", [("lllllg", 4), ("l", 2)]),
        ("lllllg" * 3, [("lllllg", 3)]),
        ("lg" * 13, [("lg", 13)]),
        ("lgl", [("l", 1), ("g", 1), ("l", 1)]),
        ("lllllgll", [("l", 5), ("g", 1), ("l", 2)]),
        ("g" + "l" * 30, [("g", 1), ("l", 30)]),
        ("lglgl", [("lg", 2), ("l", 1)]),
        ("l" * 7, [("l", 7)]),
        ("g", [("g", 1)]),
    ],
)
def test_layers_as_repeating_patterns(kinds, patterns):
    found = repeating_patterns(tuple(kinds))
    assert [("".join(pattern), repeats) for pattern, repeats in found] == patterns
    assert "".join("".join(pattern) * repeats for pattern, repeats in found) == kinds


def test_any_arrangement_of_layers_holds_every_layer_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        kinds = tuple(rng.choice([LOCAL, GLOBAL], rng.integers(1, 20)))
        config = override(GEMMA2, num_hidden_layers=len(kinds), layer_types=kinds)
        model = build(config)
        groups = model.layer_groups()
        found = [
            groups[int(group.removeprefix("group_"))].blocks[int(block.removeprefix("block_"))].keywords.get("window")
            for (group, block), _ in model.layer_paths()
        ]
        assert config.layer_kinds == kinds
        assert found == [config.sliding_window if kind == LOCAL else None for kind in kinds]


@pytest.mark.parametrize(("config_class", "turn"), [(Gemma3Config, 6), (Gemma2Config, 2)])
def test_kinds_of_layers_follow_the_pattern(config_class, turn):
    config = config_class(num_hidden_layers=13)
    assert config.layer_kinds == tuple(GLOBAL if (layer + 1) % turn == 0 else LOCAL for layer in range(13))
    assert config_class(num_hidden_layers=13, layer_types=list(config.layer_kinds)) == config
    assert hash(config_class(num_hidden_layers=2, layer_types=[GLOBAL, LOCAL])) is not None
    # What was not said goes with the depth.
    assert len(override(config, num_hidden_layers=20).layer_kinds) == 20


def test_a_local_layer_sees_its_window_and_a_global_one_everything():
    """By which tokens the last one's logits depend on."""
    for kind, seen in ((LOCAL, 5), (GLOBAL, 40)):
        config = override(GEMMA2, num_hidden_layers=1, layer_types=[kind])
        model, variables = build(config), draw_variables(config)

        def logits(embedding, model=model, variables=variables):
            context = model.context(jnp.arange(40)[None])
            block = model.layer_groups()[0].blocks[0](parent=None)
            layer = jax.tree.map(lambda leaf: leaf[0], variables["params"]["group_0"]["block_0"])
            return block.apply({"params": layer}, embedding, context)[0][0, -1]

        embedding = np.random.default_rng(0).standard_normal((1, 40, 12), np.float32)
        grad = np.asarray(jax.jit(jax.jacobian(logits))(embedding))
        assert np.array_equal(np.flatnonzero(np.abs(grad).max(axis=(0, 1, 3))), np.arange(40 - seen, 40))


@partial(jax.jit, static_argnums=0)
def value_and_gradient(model, variables):
    return jax.value_and_grad(lambda v: jnp.square(model.apply(v, TOKENS)).mean())(variables)


@pytest.mark.exhaustive
def test_ways_to_run_the_layers_agree():
    """Forward and back, of layers of two kinds in two groups. (Each way alone: tests/models/test_deepseek3.py.)"""
    variables = draw_variables(GEMMA3)
    expected = value_and_gradient(build(GEMMA3), variables)
    found = value_and_gradient(build(GEMMA3, scan_layers=False, remat="full", attention="masked"), variables)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=1e-5), found, expected)


# Decoding.


@pytest.mark.parametrize(
    ("arrange", "prompt"),
    [(by_output, 3), (lambda tree: tree, 14)],
    ids=["by output, shorter than the window", "as they are, longer"],
)
def test_decoding_far_past_the_window_equals_the_whole_pass(config, variables, arrange, prompt):
    """One token at a time from unequal prompts."""
    model = build(config)
    whole, lengths = np.asarray(apply(model, variables, TOKENS)), np.array([2, prompt])
    outside, layers = model.slice_layers(variables, arrange)
    real = (np.arange(prompt) < lengths[:, None]).astype(np.int32)
    positions = np.tile(np.arange(prompt), (2, 1))
    caches = model.create_caches(2, prompt, jnp.float32)
    output = apply(model, variables, TOKENS[:, :prompt], positions, real, caches, method="forward")
    caches = tuple(cache.extend(40) for cache in model.slice_caches(output.caches))
    for step in range(40 - prompt):
        positions = lengths + step
        newest = TOKENS[np.arange(2), positions][:, None]
        logits, caches = decode(model, outside, layers, newest, positions[:, None], caches)
        np.testing.assert_allclose(np.asarray(logits)[:, 0], whole[np.arange(2), positions], atol=1e-4)


def test_local_layers_keep_a_window_and_the_lookahead(config):
    model = build(config)
    caches = model.slice_caches(model.create_caches(3, 40, jnp.bfloat16, lookahead=2))
    for kind, cache in zip(config.layer_kinds, caches, strict=True):
        assert type(cache) is (RingCache if kind == LOCAL else FullCache)
        assert cache.keys.shape == (3, 1, 8, 7 if kind == LOCAL else 40) and cache.keys.dtype == jnp.bfloat16


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", [GEMMA3], indirect=True, ids=["gemma 3"])
def test_a_draft_is_taken_back(config, variables):
    """Written past the window, rejected, and overwritten by other tokens at the same positions."""
    model = build(config)
    whole = np.asarray(apply(model, variables, TOKENS))
    outside, layers = model.slice_layers(variables)
    caches = model.create_caches(2, 40, jnp.float32, lookahead=3)
    output = apply(model, variables, TOKENS[:, :20], None, None, caches, method="forward")
    caches = model.slice_caches(output.caches)
    draft = (TOKENS[:, 20:23] + 1) % 29
    _, caches = decode(model, outside, layers, draft, np.array([[20, 21, 22]] * 2), caches)
    for start, end in ((20, 21), (21, 25)):
        positions = np.tile(np.arange(start, end), (2, 1))
        logits, caches = decode(model, outside, layers, TOKENS[:, start:end], positions, caches)
        np.testing.assert_allclose(logits, whole[:, start:end], atol=1e-4)


@pytest.mark.parametrize("config", [GEMMA2], indirect=True, ids=["gemma 2"])
def test_generated_tokens_are_those_of_the_uncached_model(config, variables):
    lm = LanguageModel(config, build(config), variables)
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :11].tolist()]
    found = generate(lm, prompts, max_new_tokens=20, sampler=Sampler(temperature=0.0), stop=[])
    for row, tokens in enumerate(prompts):
        for new in found.tokens[row]:
            padded = np.pad(tokens, (0, 40 - len(tokens)))[None]
            assert new == int(lm.logits(padded)[0, len(tokens) - 1].argmax())
            tokens = [*tokens, int(new)]


# Caps, dropout and norms.


def test_logits_are_capped(config, variables):
    bounded = override(config, final_logit_softcapping=0.5)
    free = override(config, final_logit_softcapping=None)
    found, raw = (np.asarray(apply(build(each), variables, TOKENS)) for each in (bounded, free))
    assert np.abs(raw).max() > 1.0 > 0.5 >= np.abs(found).max()
    np.testing.assert_allclose(found, 0.5 * np.tanh(raw / 0.5), atol=1e-6)


def test_a_kernel_that_cannot_cap_scores_is_refused(variables):
    """When it is asked for by name: "auto" takes another. (Which kernels can: tests/layers/test_attention.py.)"""
    with pytest.raises(BadInput, match="attention='fused' cannot run"):
        build(GEMMA2, attention="fused").init(jax.random.key(0), TOKENS)
    with pytest.raises(BadInput, match="attention='fussed' is unknown; did you mean fused"):
        build(GEMMA2, attention="fussed").init(jax.random.key(0), TOKENS)


def test_dropout_is_of_attention_weights(config, variables):
    model = build(override(config, attention_dropout=0.5))
    plain = np.asarray(apply(build(config), variables, TOKENS))
    np.testing.assert_array_equal(apply(model, variables, TOKENS), plain)
    keys = (jax.random.key(seed) for seed in (0, 1))
    first, second = (np.asarray(apply(model, variables, TOKENS, rngs={"dropout": key})) for key in keys)
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("norm", ["layer_norm", "dyt"])
def test_norms_by_name(norm):
    """Others than its own, and Dynamic Tanh's learned factor in place of the fixed one."""
    config = override(GEMMA3, norm=norm, num_hidden_layers=2, layer_types=None)
    variables = draw_variables(config)
    params = variables["params"]
    names = {"dyt": {"alpha", "scale", "bias"}, "layer_norm": {"scale", "bias"}}[norm]
    block = params["group_0"]["block_0"]
    norms = [leaf for tree in (block, block["attention"]) for name, leaf in tree.items() if name.endswith("_norm")]
    assert len(norms) == 6 and all(leaf.keys() == names for leaf in [*norms, params["final_norm"]])
    assert ("embedding_scale" in params) == (norm == "dyt")
    tokens = jnp.asarray(TOKENS)
    x = build(config).apply(variables, tokens, tokens, method="embed")
    factor = params["embedding_scale"]["scale"] if norm == "dyt" else 12**0.5
    np.testing.assert_allclose(x, params["token_embedding"]["embedding"][TOKENS] * factor, rtol=1e-5)
    grads = jax.jit(jax.grad(lambda v: jnp.square(build(config).apply(v, TOKENS)).mean()))(variables)
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)
    assert set(jax.tree.leaves(roles(params))) <= {"kernel", "embedding", "norm", "bias"}


def test_other_decoders_take_gemma_s_norm():
    for name in ("gpt2-124m", "llama-10m"):
        config = preset(name, num_hidden_layers=1, hidden_size=48, vocab_size=29, norm="zero_centred_rms_norm")
        params = init(config)["params"]
        assert params["final_norm"].keys() == {"scale"} and not params["final_norm"]["scale"].any()


# Bad input.


@pytest.mark.parametrize("config_class", [Gemma2Config, Gemma3Config])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"sliding_window": -1}, "sliding_window=-1 must be at least 1"),
        ({"max_position_embeddings": 256}, "sliding_window=4096 must be at most max_position_embeddings=256"),
        ({"layer_types": [LOCAL] * 25}, "has 25 kinds for num_hidden_layers=26"),
        (
            {"layer_types": [LOCAL] * 25 + ["local"]},
            "has 'local', which is neither sliding_attention nor full_attention",
        ),
        ({"layer_types": []}, "layer_types=() has 0 kinds for num_hidden_layers=26"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=8"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 must be positive and finite, or None"),
        ({"final_logit_softcapping": math.inf}, "final_logit_softcapping=inf must be positive and finite, or None"),
        ({"norm": "batch_norm"}, "norm='batch_norm' must be one of"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
    ],
)
def test_impossible_configs_name_the_field_and_the_rule(config_class, fields, message):
    with pytest.raises(BadInput) as caught:
        config_class(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [LOCAL, 5])
def test_kinds_of_layers_are_a_list(value):
    """Set afterwards: the annotations of the class are checked in these tests."""
    config = Gemma3Config()
    object.__setattr__(config, "layer_types", value)
    with pytest.raises(BadInput) as error:
        config.__post_init__()
    rule = "must be a list: the kind of each layer, sliding_attention or full_attention"
    assert str(error.value) == f"Gemma3Config.layer_types={value!r} {rule}"


def test_a_scaling_alone_keeps_the_base_of_the_family():
    scaling = {"rope_type": "linear", "factor": 8.0}
    assert Gemma3Config(rope_parameters=scaling).rope_parameters.rope_theta == 1_000_000.0
    assert Gemma3Config(local_rope_parameters=scaling).local_rope_parameters.rope_theta == 10_000.0
    assert Gemma2Config(rope_parameters=scaling | {"rope_theta": None}).rope_parameters.rope_theta == 10_000.0


def test_ropes_by_the_kind_of_layer_as_in_transformers():
    scaling = {"rope_type": "linear", "factor": 8.0}
    both = {GLOBAL: scaling, LOCAL: {"rope_theta": 500.0}}
    expected = Gemma3Config(rope_parameters=scaling, local_rope_parameters={"rope_theta": 500.0})
    assert Gemma3Config(rope_parameters=both) == expected
    assert override(Gemma3Config(), rope_parameters=both) == expected
    slower = override(Gemma3Config(local_rope_parameters={"rope_theta": 700.0}), rope_parameters=both)
    assert slower.local_rope_parameters.rope_theta == 500.0
    for wrong in (both | {"rope_type": "linear"}, {GLOBAL: scaling}):
        with pytest.raises(BadInput, match=r"rope_parameters=.* must have full_attention and sliding_attention alone"):
            Gemma3Config(rope_parameters=wrong)
    with pytest.raises(BadInput, match=r"local_rope_parameters=.* beside rope_parameters\.sliding_attention"):
        Gemma3Config(rope_parameters=both, local_rope_parameters=scaling)
