import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.training.fingerprint import fingerprint

ARRAYS = {
    ("a",): jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 4)), jnp.float32),
    ("b", "half"): jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)), jnp.bfloat16),
    ("scalar",): jnp.asarray(3, jnp.int32),
    ("marks",): jnp.asarray([True, False]),
}


def test_equal_arrays_have_one_fingerprint():
    again = {name: jnp.array(np.array(array)) for name, array in ARRAYS.items()}
    assert fingerprint(again) == fingerprint(ARRAYS)
    assert len(fingerprint(ARRAYS)) == 16
    square = jnp.arange(9).reshape(3, 3)
    assert fingerprint({("a",): square}) != fingerprint({("a",): square.T})


@pytest.mark.parametrize("name", ARRAYS)
def test_every_bit_type_place_and_name_counts(name):
    array = np.array(ARRAYS[name])
    others = [np.roll(array.ravel(), 1).reshape(array.shape), -array if array.dtype != bool else ~array]
    retyped = array.view({1: np.int8, 2: np.float16, 4: np.uint32}[array.itemsize])  # the same bits
    for index in range(0, array.nbytes, 5):
        changed = bytearray(array.tobytes())
        changed[index] ^= 1
        others.append(np.frombuffer(changed, array.dtype).reshape(array.shape))
    others = [other for other in others if other.tobytes() != array.tobytes()] + [array.reshape(-1, 1)]
    found = {fingerprint(ARRAYS | {name: jnp.asarray(other)}) for other in others}
    rest = {other: array for other, array in ARRAYS.items() if other != name}
    found |= {fingerprint(rest | {("renamed",): ARRAYS[name]}), fingerprint(rest)}
    assert fingerprint(ARRAYS | {name: jnp.asarray(retyped)}) != fingerprint(ARRAYS)
    if name == ("marks",):
        found.add("")  # to roll two marks is to negate them
    assert len(found - {fingerprint(ARRAYS)}) == len(others) + 2


def test_it_is_the_same_with_a_sharding():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = {name: jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.P())) for name, a in ARRAYS.items()}
    assert fingerprint(placed) == fingerprint(ARRAYS)
