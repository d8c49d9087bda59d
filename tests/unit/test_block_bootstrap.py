"""The interval of the mean of a correlated series."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from hvd_batchgrow.results.block_bootstrap import (
    block_length,
    block_variance,
    correlation,
    mean_interval,
    seen_by_blocks,
)


def ar1(number: int, n: int, phi: float, seed: int = 5) -> NDArray[np.float64]:
    """Series x_t = φ x_{t-1} + noise from the stationary distribution; the true mean is 0."""
    noise = np.random.default_rng(seed).standard_normal((number, n))
    series = np.empty_like(noise)
    series[:, 0] = noise[:, 0] / math.sqrt(1 - phi**2)
    for t in range(1, n):
        series[:, t] = phi * series[:, t - 1] + noise[:, t]
    return series


@pytest.mark.parametrize(("n", "phi"), [(32, 0.0), (32, 0.3), (32, 0.5), (32, 0.7), (64, 0.0), (64, 0.5), (64, 0.7)])
def test_95_percent_intervals_contain_the_mean_in_95_percent_of_series(n: int, phi: float) -> None:
    intervals = [mean_interval(series) for series in ar1(2000, n, phi)]
    covered = np.mean([found.low <= 0 <= found.high for found in intervals])
    assert covered == pytest.approx(0.95, abs=0.03)


def test_intervals_of_uncorrelated_series_are_hardly_wider_than_students() -> None:
    series = ar1(500, 64, 0.0)
    students = stats.t.ppf(0.975, 63) * series.std(1, ddof=1) / 8
    found = np.array([mean_interval(one).half_width for one in series])
    assert 1 <= float(np.median(found / students)) < 1.12


def test_the_variance_is_that_of_all_draws_of_blocks() -> None:
    values = np.array([0.3, 1.0, -2.0, 4.0, 0.5, 0.1])
    blocks = [np.take(values, range(k, k + 2), mode="wrap") for k in range(6)]
    means = [np.concatenate(drawn).mean() for drawn in itertools.product(blocks, repeat=3)]
    assert block_variance(values, 2) == pytest.approx(np.var(means))


def test_the_correction_is_the_ratio_of_variances_of_an_ar1_process() -> None:
    phi, length = 0.6, 5
    covariance = phi ** np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    of_block = covariance.mean()  # variance of the mean of a block; blocks of the bootstrap are independent
    in_long_run = (1 + phi) / (1 - phi)  # n times the variance of the mean of a long series
    assert seen_by_blocks(phi, length) == pytest.approx(length * of_block / in_long_run)


def test_the_estimate_of_the_correlation_has_little_bias() -> None:
    plain_bias = (1 + 3 * 0.5) / 40
    found = np.mean([correlation(series) for series in ar1(3000, 40, 0.5)])
    assert found == pytest.approx(0.5, abs=plain_bias / 2)


def test_blocks_are_longer_for_correlated_series_and_at_most_a_quarter() -> None:
    assert [block_length(phi, 64) for phi in (0.0, 0.3, 0.6, 0.95)] == [1, 4, 7, 16]
    assert block_length(-0.3, 64) == block_length(0.3, 64)


def test_a_constant_series_has_an_interval_of_no_width() -> None:
    found = mean_interval(np.full(20, 0.1))
    assert (found.low, found.high) == pytest.approx((0.1, 0.1), abs=1e-15)


@pytest.mark.parametrize("series", [[1.0] * 7, [*[1.0] * 9, math.nan], [[1.0] * 9]])
def test_short_and_unusable_series_are_refused(series: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 8 finite numbers"):
        mean_interval(series)
