"""Checkpoints in float8 with a scale for each block of a matrix, as DeepSeek V3 and R1 are published.

A matrix (out, in) in float8 (E4M3) has beside it `<name>_scale_inv` in float32, one number for each block of 128 x 128
(arXiv:2412.19437, section 3.3.2); the last blocks of a row or a column may be cut short. The weights are the product of
the two, rounded to bfloat16 as in DeepSeek's own conversion. Tensors of other types are read as they are.
"""

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.interop.tables import LazyTensor

SCALE = "_scale_inv"
QUANTIZATION = "quantization_config"
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def block_size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of a block, from a config.json; None where its weights are not in float8 by blocks."""
    quantization = values.get(QUANTIZATION)
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    size = quantization.get("weight_block_size")
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise BadInput(f"{QUANTIZATION}: weight_block_size={size!r} is not two numbers of rows and columns")
    return size[0], size[1]


def without_blocks(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the dequantised weights: without the fields about blocks."""
    if block_size(values) is None:
        return values
    return {name: value for name, value in values.items() if name != QUANTIZATION}


def dequantised(state: Mapping[str, Any], block: tuple[int, int]) -> dict[str, Any]:
    """The tensors, where each matrix in float8 is replaced by its product with its scales, in bfloat16, which is
    computed when asked for."""
    scales = {name: name.removesuffix(SCALE) for name in state if name.endswith(SCALE)}
    missing = [name for name, matrix in scales.items() if matrix not in state]
    if missing:
        raise BadInput(f"{missing[0]} is the scale of a matrix that is not there")
    tensors = {name: tensor for name, tensor in state.items() if name not in scales}
    unscaled = [name for name in tensors if tensors[name].dtype in FLOAT8 and f"{name}{SCALE}" not in scales]
    if unscaled:
        raise BadInput(f"{unscaled[0]} is in float8, and its scale {unscaled[0]}{SCALE} is not there; get it again")
    return tensors | {matrix: _product(matrix, state[matrix], state[name], block) for name, matrix in scales.items()}


def _product(name: str, matrix: Any, scale: Any, block: tuple[int, int]) -> LazyTensor:
    rows, columns = block
    wanted = tuple(math.ceil(size / step) for size, step in zip(matrix.shape, block, strict=False))
    if len(matrix.shape) != 2 or tuple(scale.shape) != wanted:
        raise BadInput(
            f"{name}{SCALE} is {list(scale.shape)}; {name}, {list(matrix.shape)} in blocks of {rows} x {columns}, "
            f"takes {list(wanted)}"
        )

    def read() -> np.ndarray:
        wide = np.asarray(matrix).astype(np.float32)
        numbers = np.asarray(scale).astype(np.float32)
        if len(broken := numbers[~np.isfinite(numbers)]):
            raise BadInput(f"{name}{SCALE} holds {broken[0]} and must be finite; get it again")
        spread = numbers.repeat(rows, 0).repeat(columns, 1)
        return (wide * spread[: wide.shape[0], : wide.shape[1]]).astype(ml_dtypes.bfloat16)

    return LazyTensor(tuple(matrix.shape), np.dtype(ml_dtypes.bfloat16), read)
