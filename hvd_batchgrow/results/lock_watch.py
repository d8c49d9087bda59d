"""Whether a process trains a run, from the mark that it renews in the run's lock file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd_batchgrow.results.run_summary import FRESH_S, holder_of, read_mark


@dataclass(frozen=True)
class Holder:
    """Who holds the lock of a run."""

    state: Literal["held", "unsure", "silent", "free"]
    """held: a process renews its mark. unsure: the mark is old, and has not been watched for long enough. silent: the
    mark is not renewed, so its process was killed. free: no process has the lock."""
    name: str = ""
    """Process and host."""


class LockWatch:
    """Watches the mark in the lock file. Only the first look compares the clocks of two machines.

    Args:
        folder: the run folder.
        clock: returns seconds; for tests.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._mark: str | None = None
        self._changed_s = 0.0
        self._renewed = False
        """Whether the mark has changed since the first look, or was fresh then."""

    def look(self) -> Holder:
        """Return who holds the lock now."""
        mark, is_fresh = read_mark(self._folder)
        if not mark:
            self._mark = None
            return Holder("free")
        now = self._clock()
        if mark != self._mark:
            self._renewed = is_fresh if self._mark is None else True
            self._mark, self._changed_s = mark, now
        name = holder_of(mark)
        if now - self._changed_s > FRESH_S:
            return Holder("silent", name)
        return Holder("held" if self._renewed else "unsure", name)
