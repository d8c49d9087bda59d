"""Tables as Markdown."""

from __future__ import annotations

import re

from rich.table import Table


def markdown_table(table: Table) -> str:
    """Return a table with its title and its caption as Markdown; numbers are aligned to the right."""
    headings = [_cell(column.header) for column in table.columns]
    rows = zip(*(map(_cell, column.cells) for column in table.columns), strict=True)
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = ["| " + " | ".join(row) + " |" for row in [headings, rule, *rows]]
    return "\n\n".join(part for part in (_cell(table.title), "\n".join(lines), _cell(table.caption)) if part)


def _cell(text: object) -> str:
    """Return a text on one line, with the characters escaped that mean something in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(str(text or "").split()))
