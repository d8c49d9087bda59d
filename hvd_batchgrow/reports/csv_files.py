"""The tables and curves of a report as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hvd_batchgrow.reports.document import Document, Figure, FigureRow, Table

_TABLES = ("pairs", "arms", "runs", "phases", "events", "orders")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters with which spreadsheets start a formula."""


def csv_files(document: Document) -> dict[str, str]:
    """Return the content of each file by its name: one per table of numbers, and curves.csv with all curves."""
    tables: list[Table] = [table for table in document.blocks(Table) if table.name in _TABLES]
    files = {f"{table.name}.csv": _text(_table_rows(table)) for table in tables}
    figures = [figure for row in document.blocks(FigureRow) for figure in row.figures]
    return files | {"curves.csv": _text(_curve_rows(figures))}


def _table_rows(table: Table) -> Iterator[Sequence[Any]]:
    yield [column.key for column in table.columns]
    for row in table.rows:
        yield [row.get(column.key) for column in table.columns]


def _curve_rows(figures: Iterable[Figure]) -> Iterator[Sequence[Any]]:
    """Yield the points of all curves as they are drawn; `low` and `high` are the ends of a band."""
    yield ["figure", "curve", "x_label", "y_label", "x", "y", "low", "high"]
    for figure in figures:
        for curve in figure.curves:
            points, nothing = curve.points, [None] * len(curve.points.x)
            ends = (nothing if end is None else end.tolist() for end in (points.low, points.high))
            for values in zip(points.x.tolist(), points.y.tolist(), *ends, strict=True):
                yield [figure.name, curve.label, figure.x_label, figure.y_label, *values]


def _text(rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    """Return a value; text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float):
        return f"{float(value):.10g}"
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA) else text
