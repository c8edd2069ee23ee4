"""RoPE: its definition, the scalings that transformers does not have, lengths, and what is refused.

Those that transformers has are compared with its tables in tests/parity/test_rope.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.layers.positions import (
    ROPES,
    ByPartsNTKRope,
    ByPartsRope,
    DynamicRope,
    LongRope,
    NTKRope,
    Rope,
    document_lengths,
    rope_from,
)

WIDTH = 16
TRAINED = {"factor": 4.0, "original_max_position_embeddings": 32}
PARAMETERS = {
    "default": {},
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "dynamic": TRAINED,
    "llama3": {**TRAINED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "by_parts": TRAINED,
    "by_parts_ntk": {**TRAINED, "ntk_factor": 2.0},
    "yarn": TRAINED,
    "longrope": {**TRAINED, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}
LENGTHS = jnp.array([[64]])


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_a_pair_turns_by_its_frequency_times_its_position():
    """Su et al. 2021, eq. 34, pair by pair as complex numbers."""
    x, positions = draw(2, 5, 3, WIDTH), np.array([[0, 1, 2, 3, 4], [7, 9, 50, 51, 63]])
    frequencies = 500.0 ** (-2 * np.arange(WIDTH // 2) / WIDTH)
    turn = np.exp(1j * positions[:, :, None, None] * frequencies)
    rotation = Rope(rope_theta=500.0).rotation(jnp.asarray(positions), WIDTH)
    halves = np.asarray(x[..., : WIDTH // 2] + 1j * x[..., WIDTH // 2 :]) * turn
    np.testing.assert_allclose(rotation.apply(x), np.concatenate([halves.real, halves.imag], -1), atol=2e-5)
    pairs = np.asarray(x[..., ::2] + 1j * x[..., 1::2]) * turn
    expected = np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(rotation.apply(x, interleaved=True), expected, atol=2e-5)


def test_heads_of_another_width_than_the_rotation():
    """A model of one's own with narrower heads than its config says, whose `context` is still that of its base."""
    rotation = Rope().rotation(jnp.arange(3)[None], WIDTH)
    with pytest.raises(BadInput, match=rf"RoPE is for heads of {WIDTH} features, not 8: .*`context` of the model"):
        rotation.apply(jnp.ones((1, 3, 2, 8)))


def test_interleaved_pairs_are_halves_in_another_order():
    rotation = Rope().rotation(jnp.arange(5)[None], WIDTH)
    x, order = draw(1, 5, 3, WIDTH), np.arange(WIDTH).reshape(2, -1).T.ravel()  # 0, 8, 1, 9, ...
    np.testing.assert_array_equal(rotation.apply(x)[..., order], rotation.apply(x[..., order], interleaved=True))


@pytest.mark.parametrize("rope_type", ROPES)
def test_products_depend_on_distance_alone(rope_type):
    rope = rope_from({"rope_type": rope_type, **PARAMETERS[rope_type]}, WIDTH, 128)
    query_and_key = draw(1, 3, 1, WIDTH)

    def product(*positions):
        # The third token makes the document as long wherever the two stand.
        query, key, _ = rope.rotation(jnp.array([[*positions, 127]]), WIDTH).apply(query_and_key)[0, :, 0]
        return float(query @ key)

    assert product(30, 20) == pytest.approx(product(110, 100), abs=1e-4)
    assert abs(product(30, 20) - product(30, 25)) > 1e-2


def test_ntk_aware_frequencies():
    """Peng et al. 2023, definition 1: base' = base · s^(H / (H - 2)), so that the slowest pair slows by s exactly."""
    plain = Rope(rope_theta=1000.0).frequencies(WIDTH, LENGTHS)
    found = NTKRope(rope_theta=1000.0, factor=4.0).frequencies(WIDTH, LENGTHS)
    base = 1000.0 * 4.0 ** (WIDTH / (WIDTH - 2))
    np.testing.assert_allclose(found, [base ** (-2 * i / WIDTH) for i in range(WIDTH // 2)], rtol=1e-12)
    assert found[0] == plain[0] == 1
    assert found[-1] == pytest.approx(plain[-1] / 4, rel=1e-12)


def by_parts(base: float, factor: float, context: int, alpha: float, beta: float) -> np.ndarray:
    """Peng et al. 2023, definition 2, with eq. 17 and 18, in their letters."""
    frequencies = []
    for d in range(WIDTH // 2):
        theta = base ** (-2 * d / WIDTH)
        wavelength = 2 * np.pi / theta
        r = context / wavelength
        gamma = 0.0 if r < alpha else 1.0 if r > beta else (r - alpha) / (beta - alpha)
        frequencies.append((1 - gamma) * theta / factor + gamma * theta)
    return np.array(frequencies)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 32.0), (0.5, 3.0)])
def test_by_parts_frequencies(alpha, beta):
    parameters = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    rope = ByPartsRope(**parameters, alpha=alpha, beta=beta)
    found = rope.frequencies(WIDTH, LENGTHS)
    np.testing.assert_allclose(found, by_parts(1000.0, 4.0, 256, alpha, beta), rtol=1e-12)
    ratio = found / Rope(rope_theta=1000.0).frequencies(WIDTH, LENGTHS)
    assert ratio[0] == 1 and ratio[-1] == 0.25 and ((ratio > 0.25) & (ratio < 1)).any(), "not all of the ramp is there"

    stacked = ByPartsNTKRope(**parameters, alpha=alpha, beta=beta, ntk_factor=2.0)
    base = 1000.0 * 2.0 ** (WIDTH / (WIDTH - 2))
    np.testing.assert_allclose(stacked.frequencies(WIDTH, LENGTHS), by_parts(base, 4.0, 256, alpha, beta), rtol=1e-12)


def test_dynamic_frequencies():
    """Plain up to the trained length; beyond, those of NTK-aware scaling by s · L / trained - (s - 1)."""
    rope = DynamicRope(rope_theta=1000.0, **TRAINED)
    lengths = jnp.array([[1], [32], [33], [128]])
    found = rope.frequencies(WIDTH, lengths)
    assert found.shape == (4, 1, WIDTH // 2)
    for row, length in enumerate(lengths[:, 0].tolist()):
        growth = 4.0 * max(length, 32) / 32 - 3.0
        expected = NTKRope(rope_theta=1000.0, factor=growth).frequencies(WIDTH, lengths)
        np.testing.assert_allclose(found[row, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("rope_type", ["ntk", "by_parts", "by_parts_ntk"])
def test_what_transformers_does_not_have_is_exported_as_what_it_has(rope_type):
    rope = rope_from({"rope_type": rope_type, **PARAMETERS[rope_type]}, WIDTH, 128)
    exported = rope.exported(WIDTH)
    assert exported.rope_type in ("default", "llama3")
    np.testing.assert_array_equal(exported.frequencies(WIDTH, LENGTHS), rope.frequencies(WIDTH, LENGTHS))
    assert exported.attention_scale == rope.attention_scale == 1.0


# Lengths.


def test_document_lengths():
    positions = jnp.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(document_lengths(positions), [[5], [10]])
    positions = jnp.array([[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]])
    segments = jnp.array([[1, 1, 2, 2, 2], [0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(document_lengths(positions, segments), [[2, 2, 3, 3, 3], [1, 1, 3, 3, 3]])


@pytest.mark.parametrize("rope", [Rope(), DynamicRope(**TRAINED)])
def test_rotations_of_packed_rows_are_linear_in_their_length(rope):
    """An entry for every pair of 16,384 tokens would be 1 GB."""
    tokens = jnp.ones((1, 40), jnp.int32)
    program = str(jax.make_jaxpr(lambda *rows: rope.rotation(rows[0], WIDTH, rows[1]))(tokens, tokens))
    assert "[1,40]" in program and "[1,40,40]" not in program


def assert_same_rotation(found, expected):
    np.testing.assert_allclose(found.cos, expected.cos, atol=1e-6)
    np.testing.assert_allclose(found.sin, expected.sin, atol=1e-6)


@pytest.mark.parametrize("rope", [
    DynamicRope(**TRAINED),
    LongRope(**TRAINED, short_factor=(1.0,) * 8, long_factor=tuple(map(float, range(1, 9)))),
])  # fmt: skip
def test_frequencies_follow_the_document_s_own_length(rope):
    """In a batch of unequal rows, padded on either side, and packed."""

    def alone(length):
        return rope.rotation(jnp.arange(length)[None], WIDTH)

    def part(rotation, row, start, end):
        return type(rotation)(rotation.cos[row : row + 1, start:end], rotation.sin[row : row + 1, start:end])

    # 30 is within what the model was trained on, 40 and 50 are not.
    rows = rope.rotation(jnp.stack([jnp.arange(50), jnp.arange(50)]), WIDTH)
    assert_same_rotation(part(rows, 1, 0, 50), alone(50))
    lengths = np.array([50, 40, 30])
    right = np.arange(50) < lengths[:, None]
    padded = rope.rotation(jnp.tile(jnp.arange(50), (3, 1)), WIDTH, jnp.asarray(right.astype(np.int32)))
    left_positions = np.maximum(np.arange(50) - (50 - lengths[:, None]), 0)
    left = rope.rotation(jnp.asarray(left_positions), WIDTH, jnp.asarray(right[:, ::-1].astype(np.int32)))
    for row, length in enumerate(lengths.tolist()):
        assert_same_rotation(part(padded, row, 0, length), alone(length))
        assert_same_rotation(part(left, row, 50 - length, 50), alone(length))
    positions = jnp.concatenate([jnp.arange(30), jnp.arange(40)])[None]
    packed = rope.rotation(positions, WIDTH, jnp.array([[1] * 30 + [2] * 40]))
    assert_same_rotation(part(packed, 0, 0, 30), alone(30))
    assert_same_rotation(part(packed, 0, 30, 70), alone(40))
    assert np.abs(alone(40).cos[:, :30] - alone(30).cos).max() > 0.01, "the length changes nothing"


# Reading.


@pytest.mark.parametrize("rope_type", ROPES)
def test_there_and_back(rope_type):
    rope = rope_from({"rope_type": rope_type, "rope_theta": 500, **PARAMETERS[rope_type]}, WIDTH, 128)
    assert type(rope) is ROPES[rope_type] and rope.rope_theta == 500
    assert rope_from(rope.to_dict(), WIDTH, 128) == rope
    assert rope_from(dataclasses.asdict(rope), WIDTH, 128) == rope  # as a checkpoint of ours keeps it
    assert hash(rope) == hash(rope_from(rope, WIDTH, 128))
    assert rope.depends_on_length == (np.ndim(rope.frequencies(WIDTH, jnp.array([[8]]))) == 3)


def test_what_a_dict_leaves_out():
    assert rope_from({}, WIDTH, 128) == Rope()
    assert rope_from({"type": "linear", "factor": 2, "rope_theta": None}, WIDTH, 128).factor == 2
    assert rope_from({"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}, WIDTH, 128) == Rope()
    yarn = rope_from({"rope_type": "yarn", "original_max_position_embeddings": 32}, WIDTH, 128)
    assert (yarn.factor, yarn.original_max_position_embeddings) == (4.0, 32)
    assert rope_from({"rope_type": "dynamic", "factor": 2}, WIDTH, 128).original_max_position_embeddings == 128
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    assert rope_from({"rope_type": "longrope", **factors}, WIDTH, 128).factor == 2.0
    # As transformers: a longest row within the trained context is no reason to scale.
    assert rope_from({"rope_type": "longrope", **factors}, WIDTH, 32).attention_scale == 1.0


LLAMA3 = {"rope_type": "llama3", **PARAMETERS["llama3"]}
LONGROPE = {"rope_type": "longrope", **PARAMETERS["longrope"]}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "llama4"}, "rope_type='llama4' is unknown: did you mean llama3?"),
        ({"rope_type": ["linear"]}, "is unknown"),
        ({"rope_type": "linear", "type": "dynamic"}, "rope_type='linear' and type='dynamic'; keep one of them"),
        ({"rope_type": "linear"}, "lacks factor, which rope_type 'linear' needs"),
        ({"rope_type": "llama3", "factor": 2.0}, "lacks low_freq_factor and high_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "alpha": 1.0}, "alpha is not a parameter of rope_type 'linear'"),
        ({"factor": 2.0}, "factor is not a parameter of rope_type 'default'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not a parameter of rope_type 'default'"),
        ({"rope_theta": "10000"}, "rope_theta='10000' is not a number"),
        ({"rope_theta": True}, "rope_theta=True is not a number"),
        ({"rope_theta": float("nan")}, "rope_theta=nan is not a number"),
        ({"rope_theta": [1.0]}, "rope_theta=[1.0] is not a number"),
        ({"rope_theta": 1.0}, "rope_theta=1.0 must be above 1"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 must be at least 1"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor=1.0 must be above low_freq_factor=1.0"),
        (LLAMA3 | {"low_freq_factor": 0.0}, "low_freq_factor=0.0 must be positive"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "=0 is not a positive whole number"),
        (LLAMA3 | {"original_max_position_embeddings": 16.5}, "=16.5 is not a positive whole number"),
        ({"rope_type": "yarn", "original_max_position_embeddings": "x"}, "='x' is not a positive whole number"),
        ({"rope_type": "yarn", **TRAINED, "beta_fast": 0.5}, "beta_fast=0.5 is below beta_slow=1.0"),
        ({"rope_type": "yarn", **TRAINED, "beta_slow": 0.0}, "beta_slow=0.0 must be positive"),
        ({"rope_type": "yarn", **TRAINED, "truncate": 1}, "truncate=1 is not true or false"),
        ({"rope_type": "yarn", **TRAINED, "attention_factor": 0.0}, "attention_factor=0.0 must be positive"),
        ({"rope_type": "by_parts", **TRAINED, "beta": 1.0}, "beta=1.0 must be above alpha=1.0"),
        ({"rope_type": "by_parts", **TRAINED, "alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"rope_type": "by_parts_ntk", **TRAINED, "ntk_factor": 0.5}, "ntk_factor=0.5 must be at least 1"),
        (LONGROPE | {"long_factor": [1.0] * 7}, "long_factor has 7 factors; heads of 16 features take 8"),
        (
            LONGROPE | {"original_max_position_embeddings": 1},
            "=1 must be above 1, since attention's scale",
        ),
        (LONGROPE | {"long_factor": 2.0}, "long_factor=2.0 is not a list of numbers"),
        (LONGROPE | {"short_factor": [1.0] * 7 + ["x"]}, "is not a list of numbers"),
        (LONGROPE | {"short_factor": [0.0] * 8}, "must be positive numbers"),
    ],
)
def test_parameters_that_make_no_sense(parameters, message):
    with pytest.raises(BadInput) as error:
        rope_from(parameters, WIDTH, 128)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_heads_too_narrow():
    for rope_type in ("ntk", "dynamic", "by_parts_ntk"):
        with pytest.raises(BadInput, match=f"rope_type '{rope_type}' needs heads of 4 features, not 2"):
            rope_from({"rope_type": rope_type, **PARAMETERS[rope_type]}, 2, 128)
    rope_from(LLAMA3, 2, 128)


def test_heads_too_wide():
    with pytest.raises(BadInput, match="heads of 65,538 features are not supported; the widest are 65,536"):
        rope_from({}, 2**16 + 2, 128)
