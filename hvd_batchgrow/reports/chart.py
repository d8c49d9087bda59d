"""The geometry of a chart: scales, ticks, and paths of SVG in a square of 10,000 units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_batchgrow.reports.curves import Floats
from hvd_batchgrow.reports.document import Curve, Figure

UNITS = 10_000
_NUM_TICKS = 6
_DIGITS = 6
"""Significant digits of the numbers that a page holds."""


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis; `low` and `high` are logarithms on a logarithmic one."""

    low: float
    high: float
    is_log: bool = False

    def at(self, values: Floats) -> Floats:
        """Return the places of values, 0 at the low end and 1 at the high end."""
        with np.errstate(divide="ignore", invalid="ignore"):
            places = np.log10(values) if self.is_log else values
        return np.asarray((places - self.low) / (self.high - self.low))

    def tick_values(self) -> list[float]:
        """Return the values of the ticks."""
        return _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the places and labels of the ticks."""
        values = self.tick_values()
        return [(float(place), tick_text(v)) for v, place in zip(values, self.at(np.array(values)), strict=True)]


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten; powers alone over many decades; linear ticks within a narrow range."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, math.ceil((high - low) / _NUM_TICKS))
    factors = (1, 2, 5) if high - low < _NUM_TICKS / 2 else (1,)
    values = [m * 10.0**k for k in decades if k % every == 0 for m in factors]
    inside = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    return inside if len(inside) > 2 else [v for v in _linear_ticks(10.0**low, 10.0**high) if v > 0]


def tick_text(value: float) -> str:
    """Return a number as short as it can be: 0.05, 20,000, 2M."""
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= unit and size < unit * 1e6:
            return f"{value / unit:.4g}{letter}"
    if size and not 1e-4 <= size < 1e18:
        return f"{value:.3g}"
    return f"{float(f'{value:.6g}'):,.10g}"


def scales(figure: Figure) -> tuple[Scale, Scale]:
    """Return the axes that hold all curves of a figure, with some room."""
    x = np.concatenate([curve.points.x[np.isfinite(curve.points.y)] for curve in figure.curves])
    ends = [(c.points.y, c.points.low, c.points.high) for c in figure.curves]
    y = np.concatenate([values for curve in ends for values in curve if values is not None])
    y = y[np.isfinite(y) & ((y > 0) | (not figure.is_log))]
    return _scale(x, 0.01, is_log=False), _scale(y, 0.05, is_log=figure.is_log)


def _scale(values: Floats, room: float, *, is_log: bool) -> Scale:
    places = np.log10(values) if is_log else values
    low, high = float(places.min()), float(places.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.3 if is_log else abs(low) / 10 or 1.0
        low, high = low - half, high + half
    margin = room * (high - low)
    return Scale(low - margin, high + margin, is_log)


def curve_path(curve: Curve, x: Scale, y: Scale) -> str:
    """Return the path of a curve. A point alone between gaps is a short line."""
    (parts,) = _parts(curve, x, y, curve.points.y)
    return "".join(f"M{_list(part)}" if len(part) > 1 else f"M{_list(part)}h1" for part in parts)


def band_path(curve: Curve, x: Scale, y: Scale) -> str:
    """Return the path of the band around a curve; empty without one."""
    points = curve.points
    if points.low is None or points.high is None:
        return ""
    highs, lows = _parts(curve, x, y, points.high, points.low)
    return "".join(f"M{_list(high + low[::-1])}Z" for high, low in zip(highs, lows, strict=True) if len(high) > 1)


def _parts(curve: Curve, x: Scale, y: Scale, *ends: Floats) -> list[list[list[tuple[float, float]]]]:
    """Return the stretches of each of some values in which all are on the axes, in a square with y downwards."""
    places = np.stack([np.column_stack([x.at(curve.points.x), 1 - y.at(values)]) for values in ends]) * UNITS
    known = np.isfinite(places).all(axis=(0, 2)) & np.isfinite(curve.points.y)
    cuts = np.flatnonzero(np.diff(known)) + 1
    is_known = [piece[0] for piece in np.split(known, cuts) if len(piece)]
    return [
        [piece.tolist() for piece, keep in zip(np.split(end, cuts), is_known, strict=False) if keep] for end in places
    ]


def _list(points: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in points)


def chart_data(figure: Figure) -> dict[str, Any]:
    """Return what the page's script needs of a figure: its axes, and the values for hover and zoom."""
    x, y = scales(figure)
    return {
        "x": [x.low, x.high],
        "y": [y.low, y.high],
        "log": figure.is_log,
        "curves": [_curve_data(curve) for curve in figure.curves],
    }


def _curve_data(curve: Curve) -> dict[str, Any]:
    points = curve.points
    data: dict[str, Any] = {"label": curve.label, "steps": curve.is_steps}
    for key, values in (("x", points.x), ("y", points.y), ("low", points.low), ("high", points.high)):
        if values is not None:
            data[key] = [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
    return data
