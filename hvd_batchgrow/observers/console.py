"""Consoles that print text literally; all output of the program uses them.

By default rich interprets `[…]` as markup and `:…:` as emoji in every string that it prints, including table cells,
titles and progress descriptions. Paths, names and error messages contain such characters: `hvd_batchgrow[tables]`
would lose its extra, and a folder named `x[/b]` would raise MarkupError. Therefore only this file creates consoles and
text columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import TextWrapper
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import ProgressColumn, Task, TextColumn
from rich.text import Text

from hvd_batchgrow.messages.wording import amount, time_text

Span = tuple[str, str]
"""Text and its style; an empty style is the terminal's default."""

NOTE = "magenta"
"""Style of notes. Yellow is hard to read on a light background, and blue on a dark one."""
BAR = "bold magenta"
"""Style of the part of a bar that is done."""


class PlainConsole(Console):
    """A console that never interprets text as markup, emoji or something to highlight; rich's `style=` still works.

    Args:
        file: the stream.
        width: in columns; None: the width of the terminal.
        is_terminal: whether to draw and color; None: only if the stream is a terminal.
        quiet: print nothing.
    """

    def __init__(
        self, file: IO[str], width: int | None = None, *, is_terminal: bool | None = None, quiet: bool = False
    ) -> None:
        super().__init__(
            file=file, width=width, force_terminal=is_terminal, quiet=quiet, markup=False, emoji=False, highlight=False
        )

    def paragraph(self, text: str, style: str = "", indent: int = 0) -> None:
        """Print a text: wrapped between words on a terminal, otherwise unchanged, for grep.

        Args:
            text: the text; its line breaks are kept.
            style: of rich.
            indent: spaces before the first line; further lines have two more.
        """
        lines = text.split("\n")
        if self.is_terminal:
            # Long words are not broken, so that paths and commands can be copied.
            fill = TextWrapper(
                max(1, self.width - indent), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            lines = [part for line in lines for part in fill.wrap(line) or [""]]
        self.print("\n".join(" " * indent + line for line in lines), style=style or None, soft_wrap=True)


class UnreliableStream:
    """A text stream that becomes silent if it cannot be written, such as a pipe without a reader or a full disk.

    A run must not end because its log is lost.

    Args:
        stream: a text stream of a file descriptor.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, as far as that is possible."""
        with self._silent_after_error():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, as far as that is possible."""
        with self._silent_after_error():
            self._stream.flush()

    @contextmanager
    def _silent_after_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is still buffered, and for other writers
            os.close(nowhere)


class AmountColumn(ProgressColumn):
    """Progress as `3 of 6 files`, and the time left."""

    def render(self, task: Task) -> Text:
        """Return the text of a task; its field `unit` is the unit."""
        left = "" if task.time_remaining is None else f", {time_text(task.time_remaining)} left"
        return Text(amount(int(task.completed), int(task.total or 0), task.fields["unit"]) + left)


def description_column() -> ProgressColumn:
    """Return the column of a progress display that shows a task's description."""
    return TextColumn("{task.description}", markup=False)


class SpanLines:
    """Lines of styled text, made for the console that prints them.

    Args:
        make: returns the lines for a width in columns and for a console that may be limited to ASCII.
    """

    def __init__(self, make: Callable[[int, bool], Sequence[Sequence[Span]]]) -> None:
        self._make = make

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        for spans in self._make(options.max_width, options.ascii_only):
            yield Text.assemble(*spans, no_wrap=True, overflow="crop")
