"""Curves of reports: thinned, as steps, as differences; and their places in a chart."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.reports.chart import Scale, band_path, chart_data, curve_path, scales, tick_text
from hvd_batchgrow.reports.curves import Points, difference, steps, thin
from hvd_batchgrow.reports.document import Curve, Figure, Style

NAN = float("nan")


def points(x: list[float], y: list[float]) -> Points:
    return Points(np.array(x, dtype=float), np.array(y, dtype=float))


def test_merged_windows_weigh_by_samples_and_keep_extremes() -> None:
    curve = thin(points([1, 2, 3, 4], [1.0, 5.0, 2.0, 8.0]), np.array([3.0, 1.0, 1.0, 1.0]), most=2)
    assert curve.x.tolist() == [2, 4]
    assert curve.y.tolist() == [(3 * 1 + 5) / 4, (2 + 8) / 2]
    assert curve.low is not None
    assert curve.high is not None
    assert (curve.low.tolist(), curve.high.tolist()) == ([1, 2], [5, 8])


def test_a_short_curve_is_not_thinned() -> None:
    curve = points([1, 2], [3.0, 4.0])
    assert thin(curve, np.ones(2), most=2) is curve


@given(st.lists(st.floats(-1e6, 1e6) | st.just(NAN), min_size=11, max_size=200))
def test_a_thinned_curve_has_the_mean_and_the_extremes_of_the_whole(values: list[float]) -> None:
    weights = np.arange(1.0, len(values) + 1)
    curve = thin(points(list(range(len(values))), values), weights, most=10)
    assert len(curve.x) == 10
    assert curve.x[-1] == len(values) - 1
    known = [value for value in values if not math.isnan(value)]
    assert np.isfinite(curve.y).any() == bool(known)
    if known:
        assert curve.low is not None
        assert curve.high is not None
        assert (np.nanmin(curve.low), np.nanmax(curve.high)) == (min(known), max(known))
        inside = np.isfinite(curve.y)
        room = 1e-6
        assert (curve.low[inside] <= curve.y[inside] + room).all()
        assert (curve.y[inside] <= curve.high[inside] + room).all()


def test_steps_have_the_corners_of_equal_values_only() -> None:
    curve = steps(np.array([0.0, 1, 2]), np.array([1.0, 2, 3]), np.array([5.0, 5, 7]))
    assert list(zip(curve.x.tolist(), curve.y.tolist(), strict=True)) == [(0, 5), (2, 5), (2, 7), (3, 7)]


def test_a_difference_is_taken_at_the_points_of_the_curve_that_ends_first() -> None:
    first, second = points([1, 3, 5], [10.0, 30.0, 50.0]), points([2, 4, 8], [1.0, NAN, 7.0])
    found = difference(first, second)  # second is x - 1, between its known points
    assert (found.x.tolist(), found.y.tolist()) == ([3, 5], [30 - 2, 50 - 4])


def test_curves_without_a_common_range_have_no_difference() -> None:
    assert len(difference(points([1, 2], [1, 1]), points([3, 4], [1, 1])).x) == 0
    assert len(difference(points([1, 2], [1, 1]), points([], [])).x) == 0


def figure(curves: list[Curve], *, is_log: bool = False) -> Figure:
    return Figure("name", "title", "x", "y", tuple(curves), is_log)


def test_a_path_has_a_gap_where_a_value_is_missing() -> None:
    curve = Curve("a", points([0, 1, 2, 3], [0.0, 1.0, NAN, 1.0]), Style())
    path = curve_path(curve, Scale(0, 4), Scale(0, 1))
    assert path == "M0,10000 2500,0M7500,0h1"  # up from the lower left; then a point alone


def test_a_band_goes_along_its_upper_end_and_back_along_its_lower_end() -> None:
    low, high = np.array([0.25, 0.25]), np.array([0.75, 1.0])
    curve = Curve("a", Points(np.array([0.0, 1.0]), np.array([0.5, 0.5]), low, high), Style())
    assert band_path(curve, Scale(0, 1), Scale(0, 1)) == "M0,2500 10000,0 10000,7500 0,7500Z"


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 12.0, ["0", "2", "4", "6", "8", "10", "12"]),
        (0.61, 0.99, ["0.7", "0.8", "0.9"]),
        (-0.3, 0.6, ["-0.2", "0", "0.2", "0.4", "0.6"]),
    ],
)
def test_linear_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    assert [label for _, label in Scale(low, high).ticks()] == labels


def test_logarithmic_ticks_are_1_2_5_within_few_decades_and_powers_over_many() -> None:
    few = Scale(math.log10(0.0008), math.log10(0.1), is_log=True)
    assert [label for _, label in few.ticks()] == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]
    assert [label for _, label in Scale(0, 6, is_log=True).ticks()] == [
        *("1", "10", "100", "1,000", "10,000", "100,000", "1M")
    ]


@given(st.floats(-1e300, 1e300), st.floats(1e-9, 1e9), st.booleans())
def test_every_scale_has_few_ticks_inside(low: float, width: float, is_log: bool) -> None:
    values = [1.0 + width, 1.0] if is_log else [low, low + width * max(1.0, abs(low))]
    x, y = scales(figure([Curve("a", points([0, 1], values), Style())], is_log=is_log))
    for scale in (x, y):
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 20
        assert all(-0.01 <= place <= 1.01 for place, _ in ticks)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.1 + 0.2, "0.3"), (20_000, "20,000"), (2e6, "2M"), (1.5e9, "1.5G"), (1e-7, "1e-07")],
)
def test_ticks_are_short(value: float, shown: str) -> None:
    assert tick_text(value) == shown


def test_equal_values_have_an_axis() -> None:
    for is_log in (False, True):
        _, y = scales(figure([Curve("a", points([0, 1], [5.0, 5.0]), Style())], is_log=is_log))
        assert y.low < (math.log10(5) if is_log else 5) < y.high


def test_the_script_receives_the_values_of_a_curve() -> None:
    data = chart_data(figure([Curve("a", points([0, 1, 2], [1 / 3, NAN, 2.0]), Style(), is_steps=True)]))
    assert data["curves"] == [{"label": "a", "steps": True, "x": [0, 1, 2], "y": [0.333333, None, 2.0]}]
    assert re.fullmatch(r"\[-0\.02, 2\.02\]", str(data["x"]))
