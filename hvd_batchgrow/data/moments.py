"""Mean and deviation of a training set, chunk by chunk: no float copy of all of it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.samples import Ids, ReportProgress
from hvd_batchgrow.errors import RunError

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean and deviation, each (C,) or (features,)."""

_CHUNK_BYTES = 1 << 23


def chunks_of(
    values: NDArray[Any], what: str, report: ReportProgress, members: Ids | None = None
) -> Iterator[NDArray[Any]]:
    """Values, or the members among them, in order and a few megabytes at a time.

    Args:
        values: (N, …).
        what: told with the progress.
        report: told of every chunk.
        members: (n,) entries to take; None: all.
    """
    num_entries = len(values) if members is None else len(members)
    entry_bytes = max(1, values.nbytes // len(values))
    length = max(1, _CHUNK_BYTES // entry_bytes)
    for start in range(0, num_entries, length):
        part = slice(start, min(start + length, num_entries))
        yield values[part] if members is None else values[members[part]]
        report(what, part.stop * entry_bytes, num_entries * entry_bytes)


def image_moments(chunks: Iterable[NDArray[np.uint8]]) -> Moments:
    """Of images scaled to [0, 1], per channel, from histograms: exact.

    Args:
        chunks: of (n, H, W, C).

    Returns:
        (C,) each; the deviation is at least one step of a byte, so that a blank channel can be divided by it.
    """
    counts: NDArray[np.int64] | int = 0
    for chunk in chunks:
        channels = np.moveaxis(chunk, -1, 0)
        counts = counts + np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in channels])
    values = np.arange(256) / 255.0
    means, deviations = [], []
    for count in np.asarray(counts):
        weights = count / count.sum()
        means.append(weights @ values)
        deviations.append(max((weights @ (values - means[-1]) ** 2) ** 0.5, 1 / 255))
    return np.array(means), np.array(deviations)


def row_moments(chunks: Iterable[NDArray[np.float32]], name: str) -> Moments:
    """Of rows, per feature.

    Chunks of n₁ and n₂ rows with means m₁ and m₂ and sums of squared deviations s₁ and s₂ make, with d = m₂ - m₁,

        m = m₁ + d n₂ / (n₁ + n₂),   s = s₁ + s₂ + d² n₁ n₂ / (n₁ + n₂).

    Args:
        chunks: of (n, features).
        name: of the file, for messages.

    Returns:
        (features,) each; the deviation of a feature that never changes is 1, so that it becomes 0.

    Raises:
        RunError: a value is not finite.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """
    count, mean, squares = 0, np.float64(0), np.float64(0)
    low, high = np.float64(np.inf), np.float64(-np.inf)
    for chunk in finite_chunks(chunks, name):
        rows = chunk.astype(np.float64)
        here, total = rows.mean(axis=0), count + len(rows)
        squares = squares + ((rows - here) ** 2).sum(axis=0) + (here - mean) ** 2 * (count * len(rows) / total)
        mean = mean + (here - mean) * (len(rows) / total)
        low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        count = total
    # By the range, not by the deviation: rounding leaves a constant 0.1 a tiny one, which would blow it up.
    constant = low == high
    return np.where(constant, low, mean), np.where(constant, 1.0, np.sqrt(squares / count))


def finite_chunks(chunks: Iterable[NDArray[np.float32]], name: str) -> Iterator[NDArray[np.float32]]:
    """The chunks, each checked. Raises RunError with row and feature, from 0, of the first value that is not finite."""
    first = 0
    for chunk in chunks:
        finite = np.isfinite(chunk)
        if not finite.all():
            row, feature = np.argwhere(~finite)[0]
            raise RunError(
                f"{name}: row {first + row}, feature {feature} is {chunk[row, feature]}, not a finite number"
            )
        first += len(chunk)
        yield chunk
