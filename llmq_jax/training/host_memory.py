"""The C allocator, told to keep what training frees.

XLA's CPU backend asks malloc for its temporary buffers at every step. glibc maps large ones anew each time and gives
them back at once, and the kernel zeroes every page again: a fifth of the time of a small step, and the cores wait for
one another meanwhile. Kept in the heap, the same pages serve every step: 1.3 to 2 times as many steps a second.
"""

import ctypes
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Keep freed memory in this process, from now on. Elsewhere than with glibc nothing is done, nor needed."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)
