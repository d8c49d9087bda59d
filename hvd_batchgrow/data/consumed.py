"""Digests of what was consumed: which sample stood at which place of the stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.stream import Ids

_STEP, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def entry_digests(entries: Ids, ids: Ids) -> NDArray[np.uint64]:
    """A 64-bit number for each (place in the stream, sample id).

    Their sum modulo 2⁶⁴ is the digest of a set of them: ranks and passes add theirs in any order, and
    the digests of runs whose batches differ can be compared wherever their sample counters meet.

    Args:
        entries: (n,) places in the stream.
        ids: (n,) the samples that were taken there.
    """
    return _mix(_mix(entries.astype(np.uint64)) + ids.astype(np.uint64))


def digest(entries: Ids, ids: Ids) -> int:
    """Sum of `entry_digests` modulo 2⁶⁴."""
    return int(entry_digests(entries, ids).sum(dtype=np.uint64))


def to_halves(digest: int) -> tuple[float, float]:
    """Lower and upper 32 bits: as float64 they can be added over two million ranks without rounding."""
    return float(digest & 0xFFFFFFFF), float(digest >> 32)


def from_halves(low: float, high: float) -> int:
    """The digest whose halves, added up, these are."""
    return (int(low) + (int(high) << 32)) % 2**64


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))
