"""The interval of the mean of a short series whose terms are correlated, by block bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

_MOST_CORRELATED = 0.97
"""Largest estimate of the correlation that the block length follows."""
_MOST_CORRECTED = 0.9
"""Largest correlation that the standard error is corrected for."""


@dataclass(frozen=True)
class MeanInterval:
    """The mean of a series, and its interval."""

    n: int
    mean: float
    low: float
    high: float
    block_length: int
    """Terms of a block of the bootstrap."""
    correlation: float
    """Estimated correlation of neighboring terms."""

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def mean_interval(series: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Return the mean of a stationary series with its interval.

    The interval is d̄ ± t s. s is the standard error of the circular block bootstrap (Politis & Romano 1992): blocks of
    l neighboring terms are drawn, and the variance of their mean over all draws has a closed form, so nothing is drawn
    at random. Three corrections are for short series. t is Student's quantile for n/l - 1 degrees of freedom, and s² is
    multiplied by (n/l) / (n/l - 1) (Hesterberg 2015, arXiv 1411.5279). s² is also multiplied by the ratio of the
    variance of the mean to what blocks of l terms can see of it, both those of an AR(1) process.

    l is the length that minimizes the error of s² for an AR(1) process, (√6 φ/(1-φ²))^(2/3) n^(1/3) (Carlstein 1986;
    Politis & White 2004), at most n/4. φ is the correlation of neighboring terms, corrected for the bias
    -(1 + 3φ)/n of its estimate (Marriott & Pope 1954).

    Args:
        series: at least 8 finite numbers.
        confidence: probability with which the interval contains the true mean.

    Raises:
        ValueError: there are fewer numbers, or one is not finite.
    """
    values = np.asarray(series, dtype=np.float64)
    n = values.size
    if values.ndim != 1 or n < _LEAST or not np.isfinite(values).all():
        raise ValueError(f"a series of at least {_LEAST} finite numbers is needed")
    phi = correlation(values)
    length = block_length(phi, n)
    num_blocks = n / length
    variance = block_variance(values, length) * num_blocks / (num_blocks - 1)
    variance /= seen_by_blocks(max(0.0, min(phi, _MOST_CORRECTED)), length)
    half = float(special.stdtrit(num_blocks - 1, (1 + confidence) / 2)) * math.sqrt(variance)
    mean = float(values.mean())
    return MeanInterval(n, mean, mean - half, mean + half, length, phi)


_LEAST = 8


def correlation(values: NDArray[np.float64]) -> float:
    """Return the bias-corrected correlation of neighboring terms; 0 for a constant series."""
    centered = values - values.mean()
    total = float(centered @ centered)
    if total <= len(values) * (1e-14 * float(np.abs(values).max())) ** 2:  # rounding only
        return 0.0
    found = float(centered[1:] @ centered[:-1]) / total
    corrected = found + (1 + 3 * found) / len(values)
    return min(max(corrected, -_MOST_CORRELATED), _MOST_CORRELATED)


def block_length(phi: float, n: int) -> int:
    """Return the number of terms of a block; see `mean_interval`."""
    size = abs(phi)
    best = float((math.sqrt(6) * size / (1 - size**2)) ** (2 / 3) * n ** (1 / 3))
    return max(1, min(math.ceil(best), n // 4))


def block_variance(values: NDArray[np.float64], length: int) -> float:
    """Return the variance of the mean over all draws of the circular block bootstrap."""
    n = len(values)
    around = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:length]]))])
    means = (around[length : length + n] - around[:n]) / length
    return length / n * float(np.mean((means - values.mean()) ** 2))


def seen_by_blocks(phi: float, length: int) -> float:
    """Return the fraction of the variance of the mean that independent blocks have, for an AR(1) process of φ >= 0."""
    lags = np.arange(1, length)
    return float((1 + 2 * np.sum((1 - lags / length) * phi**lags)) * (1 - phi) / (1 + phi))
