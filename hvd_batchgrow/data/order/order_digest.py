"""Digests of what was consumed: which sample stood at which place of the stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.data.order.splitmix import mix


def entry_digests(entries: Ids, ids: Ids) -> NDArray[np.uint64]:
    """A 64-bit number for each (place in the stream, sample id).

    Their sum modulo 2⁶⁴ is the digest of a set of them: ranks and passes add theirs in any order, and
    the digests of runs whose batches differ can be compared wherever their sample counters meet.

    Args:
        entries: (n,) places in the stream.
        ids: (n,) the samples that were taken there.
    """
    return mix(mix(entries.astype(np.uint64)) + ids.astype(np.uint64))


def digest(entries: Ids, ids: Ids) -> int:
    """Sum of `entry_digests` modulo 2⁶⁴."""
    return int(entry_digests(entries, ids).sum(dtype=np.uint64))


def to_halves(digest: int) -> tuple[float, float]:
    """Lower and upper 32 bits: as float64 they can be added over two million ranks without rounding."""
    return float(digest & 0xFFFFFFFF), float(digest >> 32)


def from_halves(low: float, high: float) -> int:
    """The digest whose halves, added up, these are."""
    return (int(low) + (int(high) << 32)) % 2**64
