"""Render a report as one HTML file that loads nothing and executes nothing but its own script.

The charts are SVG that is drawn here, so that they are there with scripts disabled (as CI servers and notebooks show
pages), follow the colors of light, dark and print by style sheet, and print as lines. The script adds hover and zoom.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hvd_batchgrow.reports import chart
from hvd_batchgrow.reports.document import MOST_ROWS, Document, Figure, FigureRow
from hvd_batchgrow.storage.strict_json import dump_json

_ASSETS = Path(__file__).parent / "assets"


def html_text(document: Document) -> str:
    """Return the page of a report."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_ASSETS / "report.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        document=document,
        style=(_ASSETS / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_script_json([_data(figure) for row in document.blocks(FigureRow) for figure in row.figures]),
        drawing=_drawing,
        kind=lambda block: type(block).__name__,
        anchor=lambda title: title.lower().replace(" ", "-"),
        parts=lambda text: re.split(r"(?<=[_/-])", text),  # where a long name may be broken
        most_rows=MOST_ROWS,
    )


def _data(figure: Figure) -> dict[str, Any]:
    return {"name": figure.name, **chart.chart_data(figure)}


def _script_json(value: Any) -> str:
    """Return JSON for a script element: nothing in it can end the element or start a comment or an entity."""
    text = dump_json(value)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _drawing(figure: Figure) -> dict[str, Any]:
    """Return what the template draws of a figure."""
    x, y = chart.scales(figure)
    return {
        "x_ticks": [(f"{100 * place:.2f}", label) for place, label in x.ticks()],
        "y_ticks": [(f"{100 - 100 * place:.2f}", label) for place, label in y.ticks()],
        "bands": [(chart.band_path(curve, x, y), curve.style) for curve in figure.curves],
        "lines": [(chart.curve_path(curve, x, y), curve.style) for curve in figure.curves],
        "text": f"{figure.title}: {figure.y_label} by {figure.x_label}, "
        + ", ".join(curve.label for curve in figure.curves),
    }
