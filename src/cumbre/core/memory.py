"""Memory of processes that work on planes of pixels: kept and used again instead of given back after every step.

glibc maps arrays of more than 32 MB anew each time they are made, and the kernel fills every page with zeros: a
quarter of the time of processing one 4096 × 4096 image. From a heap that is not trimmed the next plane comes at no cost;
the process then keeps what it needed at its peak.
"""

from __future__ import annotations

import ctypes

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_ARENA_MAX": "1"}
"""For processes to be started, of any number of threads; other C libraries ignore it."""
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def hold_memory() -> bool:
    """The same for this process, as far as its threads are not started yet; False where that is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return all(
        mallopt(name, value) == 1
        for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2_000_000_000))
    )
