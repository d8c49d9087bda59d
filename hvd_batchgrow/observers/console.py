"""The consoles that everything is printed through: text is text, whatever characters it holds.

By default rich reads `[…]` as markup and `:…:` as emoji in every string that it prints, in table cells, titles and
progress descriptions too. Paths, names of jobs, classes and tensors, and messages of exceptions hold such characters:
`hvd_batchgrow[tables]` would lose its extra, and a folder named `x[/b]` raises MarkupError. So this is the only file
that makes consoles and columns of text.
"""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.progress import ProgressColumn, TextColumn


class PlainConsole(Console):
    """A console that never reads text as markup, emoji or something to highlight; rich's `style=` works as usual.

    Args:
        file: the stream.
        width: columns; None: of the terminal.
        is_terminal: whether to draw and colour; None: whether the stream is a terminal.
        quiet: print nothing.
    """

    def __init__(
        self, file: IO[str], width: int | None = None, *, is_terminal: bool | None = None, quiet: bool = False
    ) -> None:
        super().__init__(
            file=file, width=width, force_terminal=is_terminal, quiet=quiet, markup=False, emoji=False, highlight=False
        )


def description_column() -> ProgressColumn:
    """Return the column of a progress display that shows a task's description."""
    return TextColumn("{task.description}", markup=False)
