"""A fingerprint of arrays where they are: on their devices, and the same however a mesh divides them.

The bits of an array, as words of at most 32 bits, are each mixed with their place (the end of MurmurHash3, which takes
different words to different ones) and then summed modulo 2³²: a sum of integers does not depend on its order. A change
of one word always shows in the array's sum, and any other but for one chance in 2³². Who wants to deceive can.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from llmq_jax.layers.axes import on_host


def fingerprint(arrays: Mapping[tuple[str, ...], Any]) -> str:
    """16 hexadecimal digits of the arrays' names, shapes, types and bits. All processes must ask for it together."""
    described = [(name, array.shape, str(array.dtype)) for name, array in arrays.items()]
    sums = on_host(_sums(list(arrays.values()))).tolist()
    return hashlib.sha256(repr((described, sums)).encode()).hexdigest()[:16]


@jax.jit
def _sums(arrays: list[Array]) -> UInt32[Array, " arrays"]:
    return jnp.stack([_sum(jnp.atleast_1d(array)) for array in arrays])


def _sum(array: Array) -> UInt32[Array, ""]:
    words = array.view(f"uint{8 * min(array.dtype.itemsize, 4)}").astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ (place * np.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
