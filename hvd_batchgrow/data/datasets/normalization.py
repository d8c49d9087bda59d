"""Mean and standard deviation of a training set, chunk by chunk, without a float copy of the whole set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.messages.errors import RunError

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean and std, each (C,) or (features,)."""

_CHUNK_BYTES = 1 << 23
_NUM_SHOWN = 10
"""Most non-finite values that a message lists."""


def chunks_of(values: NDArray[Any], what: str, report: ReportProgress) -> Iterator[NDArray[Any]]:
    """Yield values in order, a few megabytes at a time.

    Args:
        values: (N, …).
        what: name of the operation in progress reports.
        report: called after every chunk.
    """
    num_entries = len(values)
    entry_bytes = max(1, values.nbytes // len(values))
    length = max(1, _CHUNK_BYTES // entry_bytes)
    for start in range(0, num_entries, length):
        part = slice(start, min(start + length, num_entries))
        yield values[part]
        report(what, part.stop * entry_bytes, num_entries * entry_bytes)


def image_moments(chunks: Iterable[NDArray[np.uint8]]) -> Moments:
    """Return exact mean and std, per channel, of images scaled to [0, 1], from histograms.

    Args:
        chunks: of (n, H, W, C).

    Returns:
        (C,) each; the std is at least 1/255, so that dividing a constant channel by it is safe.
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


def row_moments(chunks: Iterable[NDArray[Any]], name: str, features: Sequence[str] = ()) -> Moments:
    """Return mean and std of rows, per feature, summed in float64.

    Chunks of n₁ and n₂ rows with means m₁ and m₂ and sums of squared deviations s₁ and s₂ make, with d = m₂ - m₁,

        m = m₁ + d n₂ / (n₁ + n₂),   s = s₁ + s₂ + d² n₁ n₂ / (n₁ + n₂).

    The first row is subtracted from all rows first, so that a large common offset adds no rounding error.

    Args:
        chunks: of (n, features), any type of numbers.
        name: of the file, for messages.
        features: names of the features, for messages; empty: messages number them from 0.

    Returns:
        (features,) each; the std of a constant feature is 1, so that it is normalized to 0.

    Raises:
        RunError: a value is not finite, or a std is too small or too large for float64.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """
    count, mean, squares = 0, np.float64(0), np.float64(0)
    low, high = np.float64(np.inf), np.float64(-np.inf)
    origin = None
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # the check of std below finds it
        for chunk in finite_chunks(chunks, name):
            rows = chunk.astype(np.float64)
            origin = rows[0].copy() if origin is None else origin
            rows -= origin
            here, total = rows.mean(axis=0), count + len(rows)
            squares = squares + ((rows - here) ** 2).sum(axis=0) + (here - mean) ** 2 * (count * len(rows) / total)
            mean = mean + (here - mean) * (len(rows) / total)
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
            count = total
        # Constant features are found by their range: rounding leaves a constant 0.1 a tiny std, and dividing explodes.
        std = np.where(low == high, 1.0, np.sqrt(squares / count))
    wrong = np.flatnonzero(~(np.isfinite(std) & (std > 0))).tolist()
    if wrong:
        feature = repr(features[wrong[0]]) if features else wrong[0]
        fault = f"the squares of its values are too {'small' if std[wrong[0]] == 0 else 'large'} for float64"
        raise RunError(f"{name}: feature {feature} cannot be standardized: {fault}; store it in another unit")
    return origin + np.where(low == high, low, mean), std


def present_means(chunks: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    """Return the mean of each column without its NaN; NaN for a column of NaN alone.

    The mean of a constant is the constant itself, without rounding, so that `row_moments` finds it constant.

    Args:
        chunks: of (n, columns).
    """
    count, mean = np.int64(0), np.float64(0)
    low, high = np.float64(np.inf), np.float64(-np.inf)
    for chunk in chunks:
        here = ~np.isnan(chunk)
        count = count + here.sum(axis=0)
        mean = mean + np.where(here, chunk - mean, 0.0).sum(axis=0) / np.maximum(count, 1)
        low = np.minimum(low, np.where(here, chunk, np.inf).min(axis=0))
        high = np.maximum(high, np.where(here, chunk, -np.inf).max(axis=0))
    return np.where(count > 0, np.clip(mean, low, high), np.nan)


def finite_chunks(chunks: Iterable[NDArray[Any]], name: str) -> Iterator[NDArray[Any]]:
    """Yield the chunks, and check that all values are finite.

    Raises:
        RunError: after the last chunk, with row and feature, from 0, of the first values that are not finite.
    """
    first, count = 0, 0
    shown: list[str] = []
    for chunk in chunks:
        wrong = np.argwhere(~np.isfinite(chunk))
        count += len(wrong)
        for row, feature in wrong[: _NUM_SHOWN - len(shown)]:
            shown.append(f"row {first + row}, feature {feature} is {chunk[row, feature]}, not a finite number")
        first += len(chunk)
        yield chunk
    if count:
        more = f"; and {count - len(shown):,} more" if count > len(shown) else ""
        raise RunError(f"{name}: {'; '.join(shown)}{more}")


def loses_digits(exact: NDArray[np.longdouble], dtype: type[np.floating[Any]] = np.float64, num_bits: int = 14) -> bool:
    """Return whether rounding changes values by more than their range / 2^num_bits, if they differ.

    Args:
        exact: (n,) at least one value; longdouble has 64 bits of mantissa or more, enough for any 64-bit integer.
        dtype: to which the values are rounded.
        num_bits: of the range that must be left.
    """
    error = np.abs(exact - exact.astype(dtype)).max()
    return bool(error > (exact.max() - exact.min()) * 2.0**-num_bits > 0)
