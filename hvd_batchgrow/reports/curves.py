"""Curves of runs: thinned, as steps, and as differences; NaN in y is a gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_POINTS = 500
"""Points of a curve that is thinned. With the two ends of its band, that is 1,500 numbers."""


@dataclass(frozen=True)
class Points:
    """The points of a curve, and the ends of the band around it, if it has one."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None

    def with_finite_x(self) -> Points:
        """Return the points whose x is finite; a y that is not finite is a gap."""
        kept = np.isfinite(self.x)
        y = np.where(np.isfinite(self.y), self.y, np.nan)
        ends = (None if end is None else end[kept] for end in (self.low, self.high))
        return Points(self.x[kept], y[kept], *ends)

    def scaled(self, factor: float) -> Points:
        """Return the points with y times a factor."""
        ends = (None if end is None else end * factor for end in (self.low, self.high))
        return Points(self.x, self.y * factor, *ends)


def thin(points: Points, weights: Floats, most: int = MOST_POINTS) -> Points:
    """Return at most `most` points of a noisy curve: means of consecutive points, with a band between their extremes.

    A point of training is the mean over a window of samples, and its x is the end of the window. Merging windows
    therefore weights y by the samples, and keeps the last x.

    Args:
        points: a curve without a band; in order of x.
        weights: of each point, such as its number of samples; at least 0.
        most: a shorter curve is returned as it is.
    """
    if len(points.x) <= most:
        return points
    starts = np.linspace(0, len(points.x), most, endpoint=False).astype(np.int64)
    known = np.isfinite(points.y)
    weight = np.where(known & (weights > 0), weights, 0.0)
    total = np.add.reduceat(weight, starts)
    sums = np.add.reduceat(np.where(known, points.y, 0.0) * weight, starts)
    mean = np.divide(sums, total, out=np.full(len(starts), np.nan), where=total > 0)
    low = np.minimum.reduceat(np.where(known, points.y, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, points.y, -np.inf), starts)
    ends = np.append(starts[1:], len(points.x)) - 1
    return Points(points.x[ends], mean, _known(low, mean), _known(high, mean))


def _known(end: Floats, mean: Floats) -> Floats:
    return np.where(np.isfinite(mean), end, np.nan)


def thin_band(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most `most` points of a curve with a band: every k-th one, with the widest band of its bin."""
    if len(points.x) <= most or points.low is None or points.high is None:
        return points
    starts = np.linspace(0, len(points.x), most, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], len(points.x)) - 1
    low = np.fmin.reduceat(points.low, starts)
    high = np.fmax.reduceat(points.high, starts)
    return Points(points.x[ends], points.y[ends], low, high)


def steps(starts: Floats, ends: Floats, values: Floats, most: int = MOST_POINTS) -> Points:
    """Return the corners of a step function with a value from each start to each end.

    Equal values that follow each other are one step. More than `most` / 2 steps are thinned like a noisy curve.
    """
    if not len(values):
        return Points(starts, values)
    first = np.append(True, values[1:] != values[:-1])
    last = np.append(first[1:], True)
    if first.sum() > most // 2:
        return thin(Points(ends, values), ends - starts, most)
    x = np.column_stack([starts[first], ends[last]]).ravel()
    return Points(x, np.repeat(values[first], 2))


def difference(first: Points, second: Points) -> Points:
    """Return first - second at the points of the curve that ends first; the other one is interpolated linearly there.

    Both need x that does not decrease. Points without y are skipped, and so are those before the other curve starts.
    """
    first, second = _only_known(first), _only_known(second)
    if not len(first.x) or not len(second.x):
        return Points(np.empty(0), np.empty(0))
    x = first.x if first.x[-1] <= second.x[-1] else second.x
    x = x[x >= max(first.x[0], second.x[0])]
    return Points(x, np.interp(x, first.x, first.y) - np.interp(x, second.x, second.y))


def _only_known(points: Points) -> Points:
    kept = np.isfinite(points.x) & np.isfinite(points.y)
    return Points(points.x[kept], points.y[kept])
