"""Draw the figures of a report as PNG and SVG."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from hvd_batchgrow.reports.chart import scales, tick_text
from hvd_batchgrow.reports.document import Curve, Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#a6508c", "#8a6d00", "#3f9bd6", "#6b7280", "#000000")
"""The colors of reports/assets/report.css on a light page: those of Okabe and Ito, darker where they were pale."""
_DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)), (0, (12, 3)))
_FORMATS = ("png", "svg")
_WIDTH = 7.0
"""Inches; the height grows with a legend below the axes."""
_MOST_INSIDE = 10
"""Most entries of a legend within the axes."""


def pictures(figure: Figure) -> dict[str, bytes]:
    """Return the files of a figure by name: NAME.png and NAME.svg."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    settings: Any = {"svg.hashsalt": figure.name, "text.parse_math": False, "axes.unicode_minus": True}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font does not have
        columns = max(1, int(_WIDTH / (0.6 + 0.07 * max((len(curve.label) for curve in figure.curves), default=0))))
        rows = -(-len(figure.curves) // columns) if len(figure.curves) > _MOST_INSIDE else 0
        canvas = Canvas(figsize=(_WIDTH, 4 + 0.18 * rows), layout="constrained")
        axis = canvas.subplots()
        _draw(figure, axis)
        if rows:
            canvas.legend(fontsize="small", loc="outside lower center", ncols=columns)
        else:
            axis.legend(fontsize="small")
        return {f"{figure.name}.{suffix}": _saved(canvas, suffix) for suffix in _FORMATS}


def _draw(figure: Figure, axis: Any) -> None:
    for curve in figure.curves:
        _draw_curve(curve, axis)
    if figure.is_log:
        axis.set_yscale("log")
        # Matplotlib labels powers of ten only, in its language for formulas; a narrow axis may have no such label.
        values = scales(figure)[1].tick_values()
        axis.set_yticks(values, [tick_text(value) for value in values])
        axis.set_yticks([], minor=True)
    axis.set_title(figure.title)
    axis.set_xlabel(figure.x_label)
    axis.set_ylabel(figure.y_label)
    axis.grid(alpha=0.3)


def _draw_curve(curve: Curve, axis: Any) -> None:
    points, color = curve.points, COLORS[curve.style.color]
    if points.low is not None and points.high is not None:
        axis.fill_between(points.x, points.low, points.high, color=color, alpha=0.22, linewidth=0)
    marker = "o" if np.isfinite(points.y).sum() == 1 else None
    label = curve.label if not curve.label.startswith("_") else f" {curve.label}"  # a leading _ hides a label
    axis.plot(
        points.x, points.y, color=color, linestyle=_DASHES[curve.style.dash], linewidth=1.5, label=label, marker=marker
    )


def _saved(canvas: Any, suffix: str) -> bytes:
    out = io.BytesIO()
    canvas.savefig(out, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else {"Software": None})
    return out.getvalue()
