"""Consoles that print text literally; all output of the program uses them.

By default rich interprets `[…]` as markup and `:…:` as emoji in every string that it prints, including table cells,
titles and progress descriptions. Paths, names and error messages contain such characters: `hvd_batchgrow[tables]`
would lose its extra, and a folder named `x[/b]` would raise MarkupError. Therefore only this file creates consoles and
text columns.
"""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.progress import ProgressColumn, TextColumn


class PlainConsole(Console):
    """A console that never interprets text as markup, emoji or something to highlight; rich's `style=` still works.

    Args:
        file: the stream.
        width: in columns; None: the width of the terminal.
        is_terminal: whether to draw and colour; None: only if the stream is a terminal.
        quiet: print nothing.
    """

    def __init__(
        self, file: IO[str], width: int | None = None, *, is_terminal: bool | None = None, quiet: bool = False
    ) -> None:
        super().__init__(
            file=file, width=width, force_terminal=is_terminal, quiet=quiet, markup=False, emoji=False, highlight=False
        )


def field_column(name: str) -> ProgressColumn:
    """Return the column of a progress display that shows a field of a task."""
    return TextColumn(f"{{task.fields[{name}]}}", markup=False)


def description_column() -> ProgressColumn:
    """Return the column of a progress display that shows a task's description."""
    return TextColumn("{task.description}", markup=False)
