"""A report as plain data, made once and rendered as HTML, Markdown, CSV and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hvd_batchgrow.reports.curves import Points
from hvd_batchgrow.reports.text import clean

MOST_ROWS = 300
"""Rows of a table that a page shows; the CSV files have all."""


@dataclass(frozen=True)
class Paragraph:
    """A sentence or more; plain text."""

    text: str
    kind: Literal["text", "verdict", "warning"] = "text"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    """Its name in CSV."""
    heading: str
    show: Callable[[Any], str] = clean
    """Returns a value as readers see it; CSV has the value itself."""
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """A table. Rows map the keys of columns to values; a missing value is an empty cell."""

    name: str
    """Name of its CSV file."""
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]]

    def shown_rows(self, most: int) -> list[list[str]]:
        """Return the cells of the first rows as readers see them."""
        return [[_shown(column, row.get(column.key)) for column in self.columns] for row in self.rows[:most]]


def _shown(column: Column, value: Any) -> str:
    return "" if value is None else column.show(value)


def with_values(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Return the columns that have a value in some row."""
    return tuple(column for column in columns if any(row.get(column.key) is not None for row in rows))


@dataclass(frozen=True)
class Style:
    """How a curve is drawn: indices of a color and of a dash pattern."""

    color: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Curve:
    """A curve of a figure."""

    label: str
    points: Points
    style: Style
    is_steps: bool = False
    """Whether the points are the corners of a step function."""


@dataclass(frozen=True)
class Figure:
    """One pair of axes with curves."""

    name: str
    """Name of its files."""
    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    is_log: bool = False
    """Whether the y axis is logarithmic."""


@dataclass(frozen=True)
class FigureRow:
    """Figures that belong beside each other, with one legend."""

    figures: tuple[Figure, ...]

    @property
    def legend(self) -> list[Curve]:
        """One curve for each label and style."""
        return list({(c.label, c.style): c for figure in self.figures for c in figure.curves}.values())


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font."""

    title: str
    text: str
    language: str = ""
    is_open: bool = True
    """False: closed until the reader opens it, and not printed."""


Block = Paragraph | Table | FigureRow | Code


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    def blocks(self, kind: type[Any]) -> list[Any]:
        """Return all blocks of a kind, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, kind)]
