"""Statistics of paired runs: the interval of a difference, equivalence, and McNemar's test.

A difference d_i is the result of one run minus that of another with the same seed. n pairs have the mean d̄ and the
standard deviation s, and t(p, k) is the p quantile of Student's distribution with k degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

_ROUNDING = 1e-9
"""Equal differences of results in percent differ by less than this fraction of them."""
_MOST_PAIRS = 10**6
"""Upper limit of the search for a number of pairs."""


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences, and its interval d̄ ± t((1 + confidence) / 2, n - 1) s / √n."""

    n: int
    mean: float
    std: float | None
    """Standard deviation s of the differences, with n - 1 in the denominator; None, as low and high, for one pair, and
    for several pairs whose differences are equal and not 0: by chance, which says nothing of their spread."""
    low: float | None
    high: float | None
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Equivalence:
    """Whether the true mean difference lies within (-margin, margin): two one-sided t tests (Schuirmann 1987)."""

    margin: float
    alpha: float
    """Level of each test: the largest probability of a false "equivalent"."""
    p: float | None
    """The larger p-value of the two tests; None, as low and high, if the standard deviation is None."""
    is_equivalent: bool
    """Whether p < alpha, that is, the interval from low to high lies within the margin."""
    low: float | None
    """Lower end of the interval of confidence 1 - 2 alpha."""
    high: float | None
    pairs_needed: int | None
    """Total number of pairs with which the test finds equivalence with probability 0.8 if the true difference is 0
    and the standard deviation is that of the differences; None: that is unknown, or the number is above a million."""


def paired_difference(differences: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """Return the mean of paired differences with its t interval.

    Args:
        differences: one per pair, at least one; finite.
        confidence: probability with which the interval contains the true mean, if the differences are normal.
    """
    n, mean, std = _moments(differences)
    if std is None:
        return PairedDifference(n, mean, None, None, None, confidence)
    low, high = mean_interval(n, mean, std, confidence)
    return PairedDifference(n, mean, std, float(low), float(high), confidence)


def equivalence(differences: Sequence[float], margin: float, alpha: float = 0.05) -> Equivalence:
    """Test whether the true mean of paired differences lies within a margin.

    Two one-sided t tests reject "the mean is at most -margin" and "the mean is at least margin"; p is the larger of
    their p-values (Schuirmann 1987, doi:10.1007/BF01068419).

    Args:
        differences: one per pair, at least one; finite.
        margin: the largest difference that does not matter, above 0, in the unit of the differences.
        alpha: level of each test.
    """
    n, mean, std = _moments(differences)
    if std is None:
        return Equivalence(margin, alpha, None, False, None, None, None)
    low, high = mean_interval(n, mean, std, 1 - 2 * alpha)
    p = float(equivalence_p(n, mean, std, margin))
    needed = pairs_for_power(margin, std, alpha)
    return Equivalence(margin, alpha, p, p < alpha, float(low), float(high), needed)


def mean_interval(n: int, mean: ArrayLike, std: ArrayLike, confidence: float) -> tuple[Any, Any]:
    """Return the ends of the t interval of the mean of n numbers; means and standard deviations may be arrays."""
    half = special.stdtrit(n - 1, (1 + confidence) / 2) * np.asarray(std) / math.sqrt(n)
    return mean - half, mean + half


def equivalence_p(n: int, mean: ArrayLike, std: ArrayLike, margin: float) -> Any:
    """Return the larger p-value of the two one-sided t tests; means and standard deviations may be arrays.

    Without spread (std = 0), it is 0 within the margin and 1 elsewhere.
    """
    distance, error = margin - np.abs(mean), np.asarray(std) / math.sqrt(n)
    certain = np.where(distance > 0, np.inf, -np.inf)
    return special.stdtr(n - 1, -np.divide(distance, error, out=certain, where=error > 0))


def pairs_for_power(margin: float, std: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return the smallest number of pairs for which `equivalence_power` is at least `power`.

    For many pairs it is close to (t(1 - alpha, n - 1) + t((1 + power) / 2, n - 1))² std² / margin².

    Returns:
        at least 2; None: above a million.
    """
    high = 2
    while equivalence_power(high, margin, std, alpha) < power:
        if high == _MOST_PAIRS:
            return None
        high = min(2 * high, _MOST_PAIRS)
    low = high // 2  # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if equivalence_power(middle, margin, std, alpha) >= power else (middle, high)
    return high


def equivalence_power(pairs: int, margin: float, std: float, alpha: float = 0.05) -> float:
    """Return the probability that `equivalence` finds equivalence if the true mean difference is 0.

    Given the measured standard deviation s, it is the probability that |d̄| < margin - t(1 - alpha, n - 1) s / √n,
    where d̄ is normal with standard deviation std / √n. The mean of it over the distribution of s, a χ² with n - 1
    degrees of freedom, is taken at its mid-quantiles.

    Args:
        pairs: n, at least 2.
        margin: above 0.
        std: true standard deviation of the differences, at least 0.
        alpha: level of each of the two tests.
    """
    if std == 0:
        return 1.0
    quantiles = (np.arange(2000) + 0.5) / 2000
    measured = np.sqrt(special.chdtri(pairs - 1, 1 - quantiles) / (pairs - 1))  # s / std
    limit = margin / std * math.sqrt(pairs) - special.stdtrit(pairs - 1, 1 - alpha) * measured
    return float(np.mean(np.maximum(2 * special.ndtr(limit) - 1, 0)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947, doi:10.1007/BF02295996).

    It tests whether two networks are right on equally many samples. If they are, either network is equally likely to be
    the right one on a sample on which only one is right.

    Args:
        only_first: number of samples on which only the first network is right.
        only_second: number of samples on which only the second one is.
    """
    discordant = only_first + only_second
    return min(1.0, 2 * float(special.bdtr(min(only_first, only_second), discordant, 0.5))) if discordant else 1.0


def _moments(differences: Sequence[float]) -> tuple[int, float, float | None]:
    """Return number, mean and `PairedDifference.std`. Raises ValueError unless there are differences, all finite."""
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("differences must be at least one finite number")
    mean, std = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
    if std is not None and mean and std <= _ROUNDING * abs(mean):
        std = None
    return len(values), mean, std
