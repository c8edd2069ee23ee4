"""RoPE and its scalings: transformers' tables, and golden arrays of the original repository."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmq_jax.layers.positions import rope_from
from tests.parity.golden import read_golden

TRAINED = {"factor": 8.0, "original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", **TRAINED}
LONGEST = 4096
FACTORS = {
    "short_factor": np.linspace(1.0, 1.5, 32).tolist(),
    "long_factor": np.linspace(1.0, 9.0, 32).tolist(),
}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **TRAINED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3, trained at the longest": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0
    },
    "yarn": YARN,
    "yarn, not truncated": YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2},
    "yarn, attention_factor": YARN | {"attention_factor": 0.7},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn, equal mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn, one mscale": YARN | {"mscale": 2.0},
    "yarn, ramp beyond the last pair": YARN | {"original_max_position_embeddings": 131_072},
    "yarn, ramp of no length at the first pair": YARN | {"original_max_position_embeddings": 6},
    "yarn, ramp of no length": YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    "longrope": {"rope_type": "longrope", **TRAINED, **FACTORS},
    "longrope, attention_factor": {"rope_type": "longrope", **TRAINED, **FACTORS, "attention_factor": 1.2},
}  # fmt: skip
WITHOUT_FACTOR = {"yarn, no factor": YARN, "longrope, no factor": CASES["longrope"]}
WITHOUT_FACTOR = {name: {**case, "factor": None} for name, case in WITHOUT_FACTOR.items()}


def make_pair(parameters: dict, theta: float, longest: int = LONGEST):
    """(transformers' config, our rope) for heads of 64 features."""
    parameters = {**parameters, "rope_theta": theta}
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=longest, rope_parameters=dict(parameters)
    )
    return config, rope_from(parameters, 64, longest)


def assert_same_tables(config, rope, positions):
    """cos and sin of every position within 1e-6, plus what an angle in float32 leaves open.

    An angle is a product of two numbers that are rounded, and rounded itself: three times 2^-24 of it. Beside that,
    transformers computes frequencies in float32 and we in float64.
    """
    positions = np.asarray(positions)
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = (table.numpy() for table in rotary(torch.zeros(1), torch.tensor(positions)))
    np.testing.assert_array_equal(cos[..., :32], cos[..., 32:])
    found = rope.rotation(jnp.asarray(positions), 64)
    frequencies = np.asarray(rope.frequencies(64, jnp.max(jnp.asarray(positions), 1, keepdims=True) + 1))
    scale = rope.attention_scale
    assert scale == pytest.approx(rotary.attention_scaling, rel=1e-6)
    allowed = scale * (1e-6 + 6 * 2**-24 * positions[..., None] * frequencies)
    assert (np.abs(found.cos - cos[..., :32]) < allowed).all()
    assert (np.abs(found.sin - sin[..., :32]) < allowed).all()


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("case", CASES | WITHOUT_FACTOR)
def test_tables_are_those_of_transformers(case, theta):
    config, rope = make_pair((CASES | WITHOUT_FACTOR)[case], theta)
    length = LONGEST  # dynamic and longrope: at the trained length, and long
    if rope.rope_type == "default":
        expected, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[rope.rope_type](config, seq_len=length)
    found = np.broadcast_to(rope.frequencies(64, jnp.array([[length]])), (1, 1, 32))[0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert rope.attention_scale == pytest.approx(scale, rel=1e-6)
    assert_same_tables(config, rope, [np.arange(200)])
    assert_same_tables(config, rope, [np.arange(LONGEST - 200, LONGEST)])


@pytest.mark.parametrize("length", [1, 512, 513, 700, 4096, 100_000])
def test_dynamic_frequencies_at_several_lengths(length):
    config, rope = make_pair(CASES["dynamic"], 10_000.0, longest=512)
    assert rope.original_max_position_embeddings == 512
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=torch.tensor(length))
    np.testing.assert_allclose(rope.frequencies(64, jnp.array([[length]]))[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("length", "factors"), [(512, "short_factor"), (513, "long_factor")])
def test_longrope_has_frequencies_for_short_and_for_long_rows(length, factors):
    config, rope = make_pair(CASES["longrope"], 10_000.0)
    found = rope.frequencies(64, jnp.array([[length]]))[0, 0]
    expected, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    plain = 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(found * np.array(FACTORS[factors]), plain, rtol=1e-6)
    assert_same_tables(config, rope, [np.arange(length)])


def test_far_positions():
    """Llama 3.1's context: where float32 leaves angles open by 1e-2, both leave them open alike."""
    parameters = CASES["llama3"] | {"original_max_position_embeddings": 8192}
    config, rope = make_pair(parameters, 500_000.0, longest=131_072)
    assert_same_tables(config, rope, [np.arange(131_072 - 100, 131_072)])


# The original repository.

GOLDEN, META = read_golden("rope")


def original_rope(case: dict):
    """What the original calls by-part scaling, on top of NTK or without it."""
    parameters = {"rope_theta": float(case["base"])}
    if scaling := case["scal"]:
        original, longest = scaling["og_ctx_len"], scaling["ctx_len"]
        parameters |= {"rope_type": "by_parts", "original_max_position_embeddings": original}
        parameters |= {name: scaling[name] for name in ("factor", "alpha", "beta")}
        if case["ntk"]:
            parameters |= {"rope_type": "by_parts_ntk", "ntk_factor": longest / original}
    return rope_from(parameters, case["head_dim"], max(case["ctx"], scaling["ctx_len"] if scaling else 0))


@pytest.mark.parametrize("number", range(len(META["cases"])))
def test_tables_are_those_of_the_original(number):
    case = META["cases"][number]
    rope, half = original_rope(case), case["head_dim"] // 2
    if "scaled_base" in case:
        assert rope.base(case["head_dim"]) == pytest.approx(case["scaled_base"], rel=1e-12)
    frequencies = rope.frequencies(case["head_dim"], jnp.array([[1]]))
    np.testing.assert_allclose(frequencies, GOLDEN[f"out/{number}/theta"], rtol=1e-6)
    rotation = rope.rotation(jnp.arange(case["ctx"])[None], case["head_dim"])
    for name in ("cos", "sin"):
        expected = GOLDEN[f"out/{number}/{name}"][:, :half]
        np.testing.assert_allclose(getattr(rotation, name)[0], expected, rtol=0, atol=1e-5)


def test_what_is_turned_and_its_gradient_are_those_of_the_original():
    x, grad = (jnp.asarray(GOLDEN[f"in/{name}"]).swapaxes(1, 2) for name in ("x", "cotangent"))
    rotation = original_rope(META["cases"][0]).rotation(jnp.tile(jnp.arange(x.shape[1]), (len(x), 1)), x.shape[-1])
    turned, pull_back = jax.vjp(rotation.apply, x)
    np.testing.assert_allclose(turned.swapaxes(1, 2), GOLDEN["out/apply"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(pull_back(grad)[0].swapaxes(1, 2), GOLDEN["grad/x"], rtol=0, atol=2e-6)
