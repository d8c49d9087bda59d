"""The statistics of paired runs: against other implementations, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from hvd_batchgrow.results.statistics import (
    equivalence,
    equivalence_p,
    equivalence_power,
    mcnemar,
    mean_interval,
    paired_difference,
    pairs_for_power,
)

# From statsmodels 0.15.0: DescrStatsW(differences).tconfint_mean(0.05), .tconfint_mean(0.1), .ttost_mean(-0.3, 0.3).
STATSMODELS = [
    ([0.12, -0.31, 0.05, 0.22, -0.08], 0.25431388454440157, 0.19527064895655694, 0.015319126619146072),
    ([1.4, 0.9, 1.1], 0.6251609487576904, 0.4242643678203, 0.9854597733628858),
    ([0.02, 0.03, 0.01, 0.02], 0.012992282636251, 0.00960756599098, 3.415132140841288e-06),
]
"""Differences, half of the 95 % and of the 90 % interval of their mean, p-value of equivalence at 0.3."""


@pytest.mark.parametrize(("differences", "wide", "narrow", "p"), STATSMODELS)
def test_interval_and_equivalence_agree_with_statsmodels(
    differences: list[float], wide: float, narrow: float, p: float
) -> None:
    mean = sum(differences) / len(differences)
    found, equal = paired_difference(differences), equivalence(differences, 0.3)
    assert [found.low, found.high] == pytest.approx([mean - wide, mean + wide], rel=1e-6)
    assert [equal.low, equal.high] == pytest.approx([mean - narrow, mean + narrow], rel=1e-6)
    assert equal.p == pytest.approx(p, rel=1e-9)
    assert equal.is_equivalent == (p < 0.05)
    # The test and the interval say the same.
    assert equal.low is not None
    assert equal.high is not None
    assert equal.is_equivalent == (max(-equal.low, equal.high) < 0.3)


def test_the_interval_agrees_with_scipy() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 7))
    found, wanted = paired_difference((first - second).tolist(), 0.9), stats.ttest_rel(first, second)
    interval = wanted.confidence_interval(0.9)
    assert [found.low, found.high] == pytest.approx([interval.low, interval.high])
    assert found.std == pytest.approx(np.std(first - second, ddof=1))


# From statsmodels 0.15.0: mcnemar([[10, only_first], [only_second, 3]], exact=True).
@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(8, 2, 0.109375), (0, 1, 1.0), (5, 5, 1.0), (121, 59, 4.4344492637551645e-06), (0, 0, 1.0)],
)
def test_mcnemar_agrees_with_statsmodels_and_scipy(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == pytest.approx(p, rel=1e-9)
    if only_first + only_second:
        assert stats.binomtest(only_first, only_first + only_second).pvalue == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize("differences", [[0.11] * 3, [91.35 - 91.24, 91.52 - 91.41, 91.41 - 91.3], [-2.0] * 2])
def test_equal_differences_say_nothing_of_their_spread(differences: list[float]) -> None:
    """Results of 10,000 test samples are multiples of 0.01 points, so a few pairs may differ equally by chance."""
    found, equal = paired_difference(differences), equivalence(differences, margin=5.0)
    assert (found.std, found.low, found.high) == (None, None, None)
    assert (equal.p, equal.is_equivalent, equal.pairs_needed) == (None, False, None)
    assert not found.excludes_zero


def test_runs_that_are_identical_in_every_pair_are_equivalent() -> None:
    found = equivalence([0.0, 0.0, 0.0], margin=0.1)
    assert (found.low, found.high, found.is_equivalent) == (0.0, 0.0, True)


def test_one_pair_has_neither_an_interval_nor_a_p_value() -> None:
    found, equal = paired_difference([0.1]), equivalence([0.1], 0.3)
    assert (found.n, found.mean, found.std, found.low, found.high) == (1, 0.1, None, None, None)
    assert (equal.p, equal.low, equal.high, equal.pairs_needed, equal.is_equivalent) == (None, None, None, None, False)


@pytest.mark.parametrize("differences", [[], [0.1, math.nan], [math.inf], [[0.1, 0.2]]])
def test_differences_must_be_finite_numbers(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite number"):
        paired_difference(differences)


def draws(n: int, mean: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of n normal differences of standard deviation 1, 40,000 times."""
    values = np.random.default_rng(n).normal(mean, 1.0, (40_000, n))
    return values.mean(1), values.std(1, ddof=1)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_contains_the_true_difference_in_95_of_100_cases(n: int) -> None:
    low, high = mean_interval(n, *draws(n, 0.4), 0.95)
    assert np.mean((low < 0.4) & (high > 0.4)) == pytest.approx(0.95, abs=0.005)  # 4.6 standard errors


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("margin", [0.5, 1.5, 4.0])
def test_a_true_difference_of_the_margin_is_rarely_called_equivalent(n: int, margin: float) -> None:
    rate = np.mean(equivalence_p(n, *draws(n, margin), margin) < 0.05)
    assert rate <= 0.055  # 0.05, and 4.6 standard errors of this many draws
    if margin * math.sqrt(n) > 9:
        assert rate >= 0.045  # where the other margin is far away, the level is used up


@pytest.mark.parametrize(("n", "margin"), [(2, 4.0), (3, 2.0), (5, 1.0), (9, 1.1), (30, 0.5)])
def test_the_power_agrees_with_a_simulation(n: int, margin: float) -> None:
    rate = np.mean(equivalence_p(n, *draws(n, 0.0), margin) < 0.05)
    assert equivalence_power(n, margin, 1.0) == pytest.approx(rate, abs=0.012)


def exact_power(n: int, margin: float) -> float:
    """The power for a standard deviation of 1, as an integral over the density of n - 1 times the variance."""

    def integrand(x: float) -> float:
        s = math.sqrt(x / (n - 1))
        limit = margin * math.sqrt(n) - stats.t.ppf(0.95, n - 1) * s
        return float(max(0.0, 2 * stats.norm.cdf(limit) - 1) * stats.chi2.pdf(x, n - 1))

    most = (n - 1) * (margin * math.sqrt(n) / stats.t.ppf(0.95, n - 1)) ** 2  # beyond it the integrand is 0
    return float(integrate.quad(integrand, 0, most, limit=200, points=[min(n - 1, most)])[0])


@pytest.mark.parametrize("margin", [0.3, 1.0, 2.0, 3.0])
def test_the_pairs_needed_are_the_fewest_with_the_power(margin: float) -> None:
    needed = pairs_for_power(margin, 1.0)
    assert needed is not None
    assert needed > 2
    assert exact_power(needed, margin) >= 0.799
    assert exact_power(needed - 1, margin) < 0.801
    assert pairs_for_power(7 * margin, 7.0) == needed  # only the ratio counts


def test_many_pairs_follow_the_formula_of_the_normal_distribution() -> None:
    wanted = (stats.norm.ppf(0.95) + stats.norm.ppf(0.9)) ** 2 / 0.02**2
    assert pairs_for_power(0.02, 1.0) == pytest.approx(wanted, rel=0.002)
    assert pairs_for_power(1e-4, 1.0) is None  # 86 million
    # Between the last power of 2 and the limit of a million.
    assert pairs_for_power(1 / 300, 1.0) == pytest.approx(wanted * (300 * 0.02) ** 2, rel=0.002)


def test_the_pairs_needed_are_a_total() -> None:
    differences = [0.9, -0.8, 0.3, -0.5]
    assert equivalence(differences, 0.3).pairs_needed == pairs_for_power(0.3, float(np.std(differences, ddof=1)))
