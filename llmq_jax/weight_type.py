"""The type of a model's weights, where some differ: GGUF files keep norms in float32 beside half-precision matrices."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np


def weight_type(arrays: Iterable[Any]) -> np.dtype:
    """The type of most of the elements; of two that are equally common, the larger one."""
    counts: Counter[np.dtype] = Counter()
    for array in arrays:
        counts[np.dtype(array.dtype)] += math.prod(array.shape)
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize))
