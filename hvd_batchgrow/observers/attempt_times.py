"""The duration of each invocation, in record.json."""

from __future__ import annotations

import time
from collections.abc import Callable

from hvd_batchgrow.train.events import BranchesCompared, BranchStarted, Evaluation, Observer, RunEnded, RunStarted
from hvd_batchgrow.train.run.attempt_record import add_to_last_attempt


class AttemptTimes(Observer):
    """Adds `elapsed_s`, `evaluation_s` and `branches_s` to this invocation's entry in `record.json`.

    It writes them after each evaluation, after a trigger's branches and at the end. The record of a killed invocation
    thus has the time up to the last of these.

    Args:
        clock: returns seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._evaluation_s = 0.0
        self._branches_s = 0.0
        self._branches_begin: float | None = None
        """When the run paused for branches; None: it does not pause."""

    def on_start(self, event: RunStarted) -> None:
        """Start the clock."""
        self._path, self._begin = event.folder / "record.json", self._clock()

    def on_evaluation(self, event: Evaluation) -> None:
        """Write the time so far."""
        self._evaluation_s += event.seconds
        self._write()

    def on_branch(self, event: BranchStarted) -> None:
        """Start the clock of a pause."""
        self._branches_begin = self._clock() if self._branches_begin is None else self._branches_begin

    def on_branches(self, event: BranchesCompared) -> None:
        """Write the time so far."""
        self._end_pause()
        self._write()

    def on_end(self, event: RunEnded) -> None:
        """Write the duration."""
        self._end_pause()
        self._write()

    def for_branch(self) -> AttemptTimes:
        """Return the observer that times a branch."""
        return AttemptTimes(self._clock)

    def _end_pause(self) -> None:
        if self._branches_begin is not None:
            self._branches_s += self._clock() - self._branches_begin
            self._branches_begin = None

    def _write(self) -> None:
        times = {"elapsed_s": self._clock() - self._begin, "evaluation_s": self._evaluation_s}
        if self._branches_s:
            times["branches_s"] = self._branches_s
        add_to_last_attempt(self._path, times)
