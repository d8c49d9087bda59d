"""Digests of the consumed samples and their indices in the stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.data.order.splitmix import mix


def index_digests(stream_index: Ids, ids: Ids) -> NDArray[np.uint64]:
    """Return a 64-bit number for each (index in the stream, sample id).

    The digest of a set is their sum modulo 2⁶⁴: ranks and micro-batches add to it in any order, and runs with different
    batches can be compared wherever their sample counters are equal.

    Args:
        stream_index: (n,) indices in the stream.
        ids: (n,) the samples consumed there.
    """
    return mix(mix(stream_index.astype(np.uint64)) + ids.astype(np.uint64))


def digest(stream_index: Ids, ids: Ids) -> int:
    """Return the sum of `index_digests` modulo 2⁶⁴."""
    return int(index_digests(stream_index, ids).sum(dtype=np.uint64))


def to_halves(digest: int) -> tuple[float, float]:
    """Return the lower and upper 32 bits: sums of these over two million ranks are exact in float64."""
    return float(digest & 0xFFFFFFFF), float(digest >> 32)


def from_halves(low: float, high: float) -> int:
    """Return the digest from sums of halves."""
    return (int(low) + (int(high) << 32)) % 2**64
