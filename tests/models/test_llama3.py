import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.layers.linear import by_output
from llmq_jax.layers.norms import ALPHA_INIT, alpha_init
from llmq_jax.models import Gemma2Config, Llama3Config, abstract_variables, build, init, override, preset
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.training.roles import roles
from tests.models.compiled import apply, decode
from tests.weights import draw_variables

SIZES = {
    "vocab_size": 29,
    "max_position_embeddings": 32,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "initializer_range": 0.2,
}
TINY = Llama3Config(
    **SIZES,
    num_key_value_heads=1,
    intermediate_size=20,
    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
)
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 13)).astype(np.int32)


@pytest.fixture(scope="module")
def variables():
    return draw_variables(TINY)


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(config)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_presets_have_the_published_sizes(name, parameters):
    assert count(preset(name)) == parameters


def test_initialisation():
    config = Llama3Config(
        vocab_size=2000, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
    )
    params = init(config)["params"]
    block = params["group_0"]["block_0"]
    kernels = [params["token_embedding"]["embedding"], params["lm_head"]["kernel"]]
    kernels += [layer["kernel"] for part in ("attention", "mlp") for layer in block[part].values()]
    assert len(kernels) == 9
    for kernel in kernels:
        assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.03)
    assert not np.allclose(block["mlp"]["up"]["kernel"][0], block["mlp"]["up"]["kernel"][1])
    for norm in (block["attention_norm"], block["mlp_norm"], params["final_norm"]):
        assert norm.keys() == {"scale"} and (norm["scale"] == 1).all()


def test_a_laptop_s_preset_starts_from_chance():
    """Bytes, in float32 and in the type of a GPU."""
    config = preset("llama-10m", num_hidden_layers=2)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 16)).astype(np.int32)
    variables = init(config)
    for dtype in (None, "bfloat16"):
        logits = apply(build(config, dtype=dtype), variables, tokens)
        assert logits.dtype == jnp.float32
        losses = -jax.nn.log_softmax(logits[:, :-1])
        loss = jnp.take_along_axis(losses, tokens[:, 1:, None], axis=-1).mean()
        assert float(loss) == pytest.approx(np.log(257), abs=0.3)


@pytest.mark.parametrize("arrange", [lambda tree: tree, by_output], ids=["as they are", "by output"])
def test_decoding_over_sliced_layers_equals_the_whole_pass(variables, arrange):
    """One token at a time from unequal prompts, with frequencies that the length does not change."""
    config = override(TINY, rope_parameters={})
    model = build(config)
    whole, lengths = np.asarray(apply(model, variables, TOKENS)), np.array([5, 8])
    outside, layers = model.slice_layers(variables, arrange)
    caches = model.create_caches(2, 8, jnp.float32)
    output = apply(model, variables, TOKENS[:, :8], None, None, caches, method="forward")
    caches = tuple(cache.extend(13) for cache in model.slice_caches(output.caches))
    for step in range(5):
        positions = lengths + step
        newest = TOKENS[np.arange(2), positions][:, None]
        logits, caches = decode(model, outside, layers, newest, positions[:, None], caches)
        np.testing.assert_allclose(np.asarray(logits)[:, 0], whole[np.arange(2), positions], atol=1e-4)


def test_dropout_is_of_attention_weights(variables):
    model = build(override(TINY, attention_dropout=0.5))
    plain = np.asarray(apply(build(TINY), variables, TOKENS))
    np.testing.assert_array_equal(apply(model, variables, TOKENS), plain)
    keys = (jax.random.key(seed) for seed in (0, 1))
    first, second = (np.asarray(apply(model, variables, TOKENS, rngs={"dropout": key})) for key in keys)
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3


def test_a_first_token_keeps_the_whole_of_a_head_twice_or_nothing():
    """Its only weight is 1: dropped by half, 2 or 0, in each of three heads."""
    config = override(TINY, num_hidden_layers=1)
    variables = draw_variables(config)
    block = variables["params"]["group_0"]["block_0"]

    @jax.jit
    @jax.vmap
    def logits(kept):
        """Of heads that count `kept` times."""
        out = block["attention"]["out"]
        kernel = (out["kernel"].reshape(1, 3, 4, 12) * kept[:, None, None]).reshape(1, 12, 12)
        attention = block["attention"] | {"out": {"kernel": kernel}}
        params = variables["params"] | {"group_0": {"block_0": block | {"attention": attention}}}
        return build(config).apply({"params": params}, TOKENS[:, :1])[:, 0]

    possible = np.asarray(logits(jnp.asarray(list(itertools.product((0.0, 2.0), repeat=3)))))
    model, which = build(override(config, attention_dropout=0.5)), set()
    for seed in range(8):
        found = np.asarray(apply(model, variables, TOKENS[:, :1], rngs={"dropout": jax.random.key(seed)}))[:, 0]
        distances = np.abs(found - possible).max(axis=-1)
        assert (distances.min(axis=0) < 1e-5).all()
        which |= set(distances.argmin(axis=0))
    assert len(which) > 2


# Norms, in the place of another's.

DYT, RMS = {"alpha", "scale", "bias"}, {"scale"}
LAYER = {"scale", "bias"}
GPT2_TINY, LLAMA_TINY = GPT2Config(**SIZES), override(TINY, tie_word_embeddings=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("base", "norm", "names"),
    [
        (GPT2_TINY, "dyt", DYT),
        (GPT2_TINY, "rms_norm", RMS),
        (LLAMA_TINY, "dyt", DYT),
        (LLAMA_TINY, "layer_norm", LAYER),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_norms_by_name(base, norm, names):
    config = override(base, norm=norm)
    variables = init(config)
    params = variables["params"]
    norms = [params["final_norm"], *(params["group_0"]["block_0"][name] for name in ("attention_norm", "mlp_norm"))]
    assert all(found.keys() == names for found in norms)
    assert ("embedding_scale" in params) == (norm == "dyt")
    loss, grads = jax.jit(jax.value_and_grad(lambda v: jnp.square(build(config).apply(v, TOKENS)).mean()))(variables)
    assert np.isfinite(loss)
    flat, _ = jax.tree_util.tree_flatten_with_path(grads["params"])
    for path, grad in flat:
        name = jax.tree_util.keystr(path)
        if "qkv" not in name or "bias" not in name:  # that of keys shifts all scores alike
            assert np.isfinite(grad).all() and np.abs(grad).max() > 0, name
    assert set(jax.tree.leaves(roles(params))) <= {"kernel", "embedding", "norm", "bias"}
    if norm == "dyt":
        assert roles(params)["final_norm"] == {"alpha": "norm", "scale": "norm", "bias": "bias"}
        assert roles(params)["embedding_scale"] == {"scale": "norm"}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("width", [768, 2048, 4096])
def test_where_dynamic_tanh_starts(model_type, width):
    """By width, before attention and elsewhere; embeddings grow by the root of the width."""
    heads = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": width, "norm": "dyt", "vocab_size": 5}
    config = {
        "gpt2": GPT2Config(**heads),
        "llama": Llama3Config(**heads, intermediate_size=8),
        "gemma": Gemma2Config(**heads, intermediate_size=8, layer_types=["full_attention"] * 2),
    }[model_type]
    before, elsewhere = ALPHA_INIT[max(width, 1024)]

    @jax.jit  # which leaves out what is not asked for: the other parameters
    def scalars():
        params = build(config).init(jax.random.key(0), TOKENS[:, :1] * 0)["params"]
        block = params["group_0"]["block_0"]
        norms = {"attention": block["attention_norm"], "mlp": block["mlp_norm"], "final": params["final_norm"]}
        return params["embedding_scale"]["scale"], {name: norm["alpha"] for name, norm in norms.items()}

    scale, alphas = scalars()
    assert float(scale) == pytest.approx(width**0.5)
    assert build(config).bind({}).token_embedding.scale is None, "Gemma's own factor beside the learned one"
    np.testing.assert_allclose(alphas["attention"], [before] * 2)
    np.testing.assert_allclose(alphas["mlp"], [elsewhere] * 2)
    np.testing.assert_allclose(alphas["final"], elsewhere)


def test_alphas_of_other_widths():
    """Those of the nearest width in the paper's table; a width counts as large as its initial weights make it."""
    assert alpha_init(64, True) == alpha_init(1024, True) == 1.0
    assert (alpha_init(1400, False), alpha_init(1500, False)) == (1.0, 0.5)
    assert (alpha_init(4096, True), alpha_init(4096, False)) == (0.8, 0.2)
    assert alpha_init(10_000, False) == alpha_init(8192, False) == 0.05
    assert alpha_init(128, False, initializer_range=0.08) == alpha_init(2048, False) == 0.5
    assert alpha_init(4096, False, initializer_range=0.01) == alpha_init(1024, False) == 1.0


def test_a_context_shorter_than_the_one_that_rope_extends():
    config = preset("llama3.2-1b", max_position_embeddings=512)
    assert config.rope_parameters.original_max_position_embeddings == 8192
