"""How fast this machine reads memory with all cores: the ceiling of decoding, where each token reads all weights."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 2**29
"""Larger than any cache."""
REPEATS = 3


def read_bandwidth() -> float:
    """Bytes a second: the fastest of a few passes in which every core takes the maximum of a part of an array."""
    parts = np.array_split(np.ones(BYTES // 4, np.float32), os.cpu_count())
    fastest = float("inf")
    with ThreadPoolExecutor(len(parts)) as threads:
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            list(threads.map(np.max, parts))  # it releases the interpreter's lock, and reads in one vectorised pass
            fastest = min(fastest, time.perf_counter() - started)
    return BYTES / fastest
