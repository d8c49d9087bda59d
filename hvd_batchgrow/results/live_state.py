"""The state of a running run for the live view, from its plan and the lines of metrics.jsonl so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hvd_batchgrow.results.live_plan import LivePlan
from hvd_batchgrow.results.record_lines import EvaluationLine, TrainLine
from hvd_batchgrow.results.records import printable
from hvd_batchgrow.results.run_summary import metric_names
from hvd_batchgrow.schedule.cost.time_left import TimeLeft

_TREND = 120
"""Most records in a trend."""


@dataclass(frozen=True)
class TimeToGo:
    """Estimated seconds until the end of the phase and of the run."""

    phase_s: float
    run_s: float


@dataclass(frozen=True)
class LiveView:
    """An immutable snapshot of a run for display."""

    plan: LivePlan
    samples: int
    phase: int
    """Index of the phase, from 0."""
    record: TrainLine | None
    """The last training record."""
    losses: tuple[float, ...]
    """Of the last records, the newest last; likewise `metrics`."""
    metrics: tuple[float, ...]
    last: EvaluationLine | None
    best: EvaluationLine | None
    """Of the set that is evaluated during training; None if it is unknown how the metric improves."""
    to_go: TimeToGo | None
    """None: unknown before the first update."""
    record_at_s: float | None
    """Time of the last record, on the clock of the display; None: the record is older than the display."""
    state: str = ""
    """State of the run in words, such as the process that trains it; empty: the display is part of the run."""

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self.samples / self.plan.num_samples

    @property
    def run_share(self) -> float:
        """Part of the run that is done, from 0 to 1."""
        return min(1.0, self.samples / self.plan.end_samples)

    @property
    def phase_share(self) -> float:
        """Part of the phase that is done, from 0 to 1."""
        phase = self.plan.phases[self.phase]
        length = phase.end_samples - phase.start_samples
        return min(1.0, max(0.0, (self.samples - phase.start_samples) / length)) if length else 1.0


class LiveState:
    """Folds the records of a run.

    Args:
        plan: of the run.
        samples: sample counter at the start.
    """

    def __init__(self, plan: LivePlan, samples: int = 0) -> None:
        self.plan, self.samples = plan, samples
        self._record: TrainLine | None = None
        self._updates = 0
        self._losses: deque[float] = deque(maxlen=_TREND)
        self._metrics: deque[float] = deque(maxlen=_TREND)
        self._last: EvaluationLine | None = None
        self._best: EvaluationLine | None = None
        self._has_validation = False
        self._time_left = TimeLeft()
        self._begin_s: float | None = None
        self._record_at_s: float | None = None
        self._update_s = 0.0
        """Seconds that updates have taken since `_begin_s`."""
        self._slowdown = 1.0

    def replan(self, plan: LivePlan) -> None:
        """Use another plan, made by a resume or a trigger."""
        if not plan.declares_metric:
            plan = replace(plan, metric=self.plan.metric, direction=self.plan.direction)
        self.plan = plan

    def begin(self, now_s: float, updates: int | None = None) -> None:
        """Measure time from now on: the records so far are older than the display.

        Args:
            now_s: seconds on the clock of the display.
            updates: number of updates at the sample counter; None: as the last record says.
        """
        self._begin_s, self._update_s = now_s, 0.0
        self._updates = self._updates if updates is None else updates

    def add(self, line: Mapping[str, Any], now_s: float | None = None, *, measures_time: bool = True) -> None:
        """Add a line of metrics.jsonl.

        Args:
            line: the line.
            now_s: seconds on the clock of the display; None before `begin`.
            measures_time: whether the record says how long updates take now; not if another invocation made it.
        """
        if line.get("kind") == "eval":
            self._find_metric(line)
            self._add_evaluation(EvaluationLine.of(line))
        else:
            self._add_record(TrainLine.of(line, self.plan.metric), now_s, measures_time=measures_time)

    def _add_record(self, record: TrainLine, now_s: float | None, *, measures_time: bool) -> None:
        num_samples, num_updates = record.samples - self.samples, record.updates - self._updates
        if measures_time and num_samples > 0 and num_updates > 0 and record.samples_per_s > 0 and record.global_batch:
            seconds = num_samples / record.samples_per_s
            self._time_left.add(record.global_batch / max(1, record.ranks), num_updates, seconds)
            self._update_s += seconds
        self.samples, self._updates, self._record = record.samples, record.updates, record
        self._losses.append(record.loss)
        if record.metric is not None:
            self._metrics.append(record.metric)
        self._record_at_s = now_s
        if now_s is not None and self._begin_s is not None and self._update_s:
            self._slowdown = max(1.0, (now_s - self._begin_s) / self._update_s)

    def _find_metric(self, line: Mapping[str, Any]) -> None:
        """Take the metric of a user's own task from its first evaluation, also if its value is not finite."""
        if not self.plan.declares_metric and self.plan.metric == "loss" and (names := metric_names(line)):
            self.plan = replace(self.plan, metric=printable(names[0]), direction=None)

    def _add_evaluation(self, evaluation: EvaluationLine) -> None:
        self.samples, self._last = max(self.samples, evaluation.samples), evaluation
        metric, direction = self.plan.metric, self.plan.direction
        is_validation = evaluation.dataset == "validation"
        if is_validation and not self._has_validation:
            self._best, self._has_validation = None, True
        value = evaluation.value(metric)
        # A run with a validation set evaluates the test set at its end only: it is not a result of training.
        if direction is None or value is None or is_validation != self._has_validation:
            return
        best = None if self._best is None else self._best.value(metric)
        if best is None or (value > best if direction == "up" else value < best):
            self._best = evaluation

    def view(self, state: str = "") -> LiveView:
        """Return an immutable snapshot."""
        return LiveView(
            plan=self.plan,
            samples=self.samples,
            phase=self._phase(),
            record=self._record,
            losses=tuple(self._losses),
            metrics=tuple(self._metrics),
            last=self._last,
            best=self._best,
            to_go=self.to_go(),
            record_at_s=self._record_at_s,
            state=state,
        )

    def _phase(self) -> int:
        """Return the phase of the last record: a phase that has ended is shown until the next one has a record."""
        if self._record is not None and self._record.phase < len(self.plan.phases):
            return self._record.phase
        return self.plan.phase_at(self.samples)

    def to_go(self) -> TimeToGo | None:
        """Return the time that is left, with evaluations and checkpoints as in the time so far."""
        left = self._time_left.seconds(self.plan.phases, self.samples)
        if left is None:
            return None
        return TimeToGo(self._slowdown * left[self._phase()], self._slowdown * sum(left))
