"""The live view on a terminal: lines at the bottom that are drawn again every second."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.live import Live

from hvd_batchgrow.observers.console import PlainConsole, SpanLines
from hvd_batchgrow.observers.live_lines import live_lines
from hvd_batchgrow.results.live_state import LiveView


class LiveDisplay:
    """Shows the last view until it is closed; other output of the console scrolls above it.

    A separate thread draws it. Views are immutable, so training never waits for the drawing.

    Args:
        console: of a terminal.
        view: the first view.
        clock: returns seconds.
    """

    def __init__(self, console: PlainConsole, view: LiveView, clock: Callable[[], float] = time.monotonic) -> None:
        self._view, self._clock = view, clock
        self._live = Live(
            get_renderable=self._screen,
            console=console,
            refresh_per_second=1,
            transient=True,
            vertical_overflow="crop",
        )

    def start(self) -> None:
        """Draw the view. Separate from `__init__`, so that `close` can be called after an interrupt."""
        self._live.start(refresh=True)

    def _screen(self) -> SpanLines:
        view, now_s = self._view, self._clock()
        return SpanLines(lambda width, ascii_only: live_lines(view, width, now_s, ascii_only=ascii_only))

    def show(self, view: LiveView) -> None:
        """Show a view from the next second on."""
        self._view = view

    def close(self) -> None:
        """Remove the view, and show the cursor again."""
        self._live.stop()


def can_draw(console: PlainConsole) -> bool:
    """Return whether a console is a terminal whose cursor can move."""
    return console.is_terminal and not console.is_dumb_terminal
