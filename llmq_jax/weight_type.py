"""The type of a model's weights, where some differ: GGUF files keep norms in float32 beside half-precision matrices."""

import math
from collections import Counter
from typing import Any

import jax
import numpy as np


def weight_type(tree: Any) -> np.dtype:
    """The type of most of the elements of a tree of arrays; of two that are equally common, the larger one."""
    counts: Counter[np.dtype] = Counter()
    for array in jax.tree.leaves(tree):
        counts[np.dtype(array.dtype)] += math.prod(array.shape)
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize))
