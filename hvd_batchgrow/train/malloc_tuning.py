"""Keep freed memory in the process, so that it can be reused without page faults."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_INT_MAX = 2**31 - 1


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Configure glibc to return no memory to the system until the process ends.

    By default glibc maps each large block separately and unmaps it when it is freed. The kernel then maps and
    zeroes the activations again in each forward pass, page by page, which took half of the time of a small
    network's pass (`python -m benchmarks.memory`).

    Args:
        environment: environment variables; malloc settings of the user take precedence.

    Returns:
        Whether glibc accepted the setting; False with another C library, or if the user has set malloc options.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
