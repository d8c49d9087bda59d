"""Write a report as Markdown text that links to its figures in the same folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import singledispatch

from hvd_batchgrow.reports.document import MOST_ROWS, Block, Code, Document, FigureRow, Paragraph, Table


def markdown_text(document: Document) -> str:
    """Return the report as Markdown (GitHub's, with tables)."""
    lines = [f"# {escape(document.title)}", ""]
    if document.subtitle:
        lines += [escape(document.subtitle), ""]
    for section in document.sections:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_lines(block), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def escape(text: str) -> str:
    """Return text without anything that Markdown or HTML would interpret; a reader sees the same characters."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!@])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)  # within a word it is only a letter
    text = re.sub(r"^(\s*|\s*\d+)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", text)  # lists and underlines of headings
    return text.replace("://", ":\\//").replace("www.", "www\\.")  # GitHub makes links of bare addresses


@singledispatch
def _lines(block: Block) -> Iterator[str]:
    raise TypeError(f"no Markdown for {type(block).__name__}")


@_lines.register
def _paragraph(block: Paragraph) -> Iterator[str]:
    text = escape(block.text)
    yield {"verdict": f"**{text}**", "warning": f"> {text}"}.get(block.kind, text)


@_lines.register
def _table(block: Table) -> Iterator[str]:
    yield _row([escape(column.heading) for column in block.columns])
    yield _row(["--:" if column.is_number else "---" for column in block.columns])
    for cells in block.shown_rows(MOST_ROWS):
        yield _row([escape(cell) for cell in cells])
    if len(block.rows) > MOST_ROWS:
        yield ""
        yield f"The first {MOST_ROWS} of {len(block.rows):,} rows; [{block.name}.csv]({block.name}.csv) has all."


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


@_lines.register
def _figures(block: FigureRow) -> Iterator[str]:
    for figure in block.figures:
        yield f"![{escape(figure.title)}](figures/{figure.name}.svg)"


@_lines.register
def _code(block: Code) -> Iterator[str]:
    longest = max(map(len, re.findall(r"`+", block.text)), default=0)
    fence = "`" * max(3, longest + 1)
    code = (f"{fence}{block.language}", block.text.rstrip("\n"), fence)
    if not block.is_open:
        yield from (f"<details><summary>{escape(block.title)}</summary>", "", *code, "", "</details>")
        return
    if block.title:
        yield from (f"### {escape(block.title)}", "")
    yield from code
