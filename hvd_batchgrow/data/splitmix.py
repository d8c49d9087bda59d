"""SplitMix64's output function: from 64 bits to 64 others that look like no relation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEP, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What SplitMix64 gives from each state.

    Args:
        x: uint64 of any shape.

    Returns:
        uint64 of that shape.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))
