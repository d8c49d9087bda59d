"""Follow a run through its files while another process trains it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.results.live_plan import LivePlan
from hvd_batchgrow.results.live_state import LiveState
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.results.record_lines import EvaluationLine, TrainLine
from hvd_batchgrow.results.records import printable
from hvd_batchgrow.results.run_files import error_of, read_attempts
from hvd_batchgrow.schedule.adaptive.decisions import read_decisions
from hvd_batchgrow.storage.follow_json_lines import JsonLinesFollower


@dataclass(frozen=True)
class CaughtUp:
    """All existing records have been read."""

    resumed: bool
    """Whether a resume has replaced the file."""


@dataclass(frozen=True)
class NewRecord:
    """A training record, and the number of samples since the record before it."""

    record: TrainLine
    num_samples: int


Event = CaughtUp | NewRecord | EvaluationLine | str
"""An event of a run; a text is a decision, a trigger's branch or a note."""


class RunFollower:
    """Reads new lines of a run's files.

    Args:
        folder: the run folder; its files may be missing, damaged, or replaced at any time.
        clock: returns seconds; for tests.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        self.state: LiveState | None = None
        """None until there is a plan."""
        self.plan_fault: str | None = None
        """Why plan.json cannot be read; None: it can, or there is no such file."""
        self.job: dict[str, Any] = {}
        """The job file, as a tree of plain values."""
        self.metrics = JsonLinesFollower(folder / "metrics.jsonl")
        self.branches = JsonLinesFollower(folder / "branches.jsonl")
        self._versions: dict[str, object] = {}
        self._is_caught_up = False
        self._num_decisions = 0

    def poll(self) -> Iterator[Event]:
        """Yield the events since the last call; after each event, `state` includes it."""
        self._read_plan()
        if self.state is None:
            return
        yield from self._read_branches()
        yield from self._read_decisions()
        resumed = self.metrics.reopened()
        if resumed:
            self.state = LiveState(self.state.plan)
        if resumed or not self._is_caught_up:
            start = self._start_of_attempt()
            for line in self.metrics.lines():
                self.state.add(line, measures_time=line["samples"] > start)
            self.state.begin(self._clock())
            self._is_caught_up = True
            yield CaughtUp(resumed)
        for line in self.metrics.lines():
            before = self.state.samples
            self.state.add(line, self._clock())
            if line.get("kind") == "eval":
                yield EvaluationLine.of(line)
            else:
                record = TrainLine.of(line, self.state.plan.metric)
                yield NewRecord(record, record.samples - before)

    @property
    def is_finished(self) -> bool:
        """Whether the records reach the end of the plan."""
        return self.state is not None and self.state.samples >= self.state.plan.end_samples

    def error(self) -> str | None:
        """Return the first line of the error with which the last attempt ended, if it did."""
        return error_of(read_attempts(self.folder / "record.json"))

    def _has_changed(self, name: str) -> bool:
        """Return whether a file has changed since the last call, or was removed."""
        version: object = None
        with suppress(OSError):
            now = (self.folder / name).stat()
            version = (now.st_ino, now.st_size, now.st_mtime_ns)
        changed = self._versions.get(name) != version
        self._versions[name] = version
        return changed

    def _start_of_attempt(self) -> int:
        """Return the sample counter at which the last attempt began: earlier ones may have run on another machine."""
        attempts = read_attempts(self.folder / "record.json")
        start = attempts[-1].get("start_samples") if attempts else None
        return start if isinstance(start, int) else 0

    def _read_plan(self) -> None:
        """Read plan.json if it is new; a damaged one leaves the plan as it is."""
        if not self._has_changed("plan.json"):
            return
        self.plan_fault = None
        if self._versions["plan.json"] is None:
            return
        try:
            tree = read_plan(self.folder)
        except RunError as error:
            self.plan_fault = str(error)
            return
        self.job = tree["job_file"]
        if self.state is None:
            self.state = LiveState(LivePlan.of(tree))
        else:
            self.state.replan(LivePlan.of(tree))

    def _read_branches(self) -> Iterator[str]:
        """Yield which branches a trigger trains and what they show, without those before the first poll."""
        is_old = self.branches.reopened() or not self._is_caught_up
        for line in self.branches.lines():
            if not is_old:
                yield printable(str(line.get("text", "")))

    def _read_decisions(self) -> Iterator[str]:
        """Yield new decisions, without those that existed before the first poll."""
        if not self._has_changed("decisions.jsonl"):
            return
        if self._versions["decisions.jsonl"] is None:  # another run replaces this one
            self._num_decisions = 0
            return
        try:
            decisions = read_decisions(self.folder / "decisions.jsonl")[1]
        except JobError as error:
            yield printable(str(error))
            return
        if self._is_caught_up:
            for decision in decisions[self._num_decisions :]:
                yield printable(f"sample {decision.samples:,}: {decision.describe()}")
        self._num_decisions = len(decisions)
