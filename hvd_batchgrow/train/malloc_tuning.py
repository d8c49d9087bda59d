"""Memory that a process has used stays with it, to be used again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_INT_MAX = 2**31 - 1


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell glibc to give no memory back to the system until the process ends.

    By default it maps large blocks one by one and unmaps them when they are freed: each pass then
    has its activations mapped and zeroed by the kernel again, page by page, which took half of the
    time of a small network's pass (`python -m benchmarks.memory`).

    Args:
        environment: where the user has set something of glibc's own, that stands.

    Returns:
        Whether it was told so; False with another C library or a setting of the user's.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
