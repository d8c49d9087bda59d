"""Cost of a run so far: updates, samples, time, rank-hours."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from hvd_batchgrow.results.records import number
from hvd_batchgrow.results.run_files import RunFiles


@dataclass(frozen=True)
class RunCost:
    """Cost of a run, or mean cost of several runs."""

    updates: float
    samples: float
    seconds: float
    """Time of the updates on record, without evaluations, checkpoints and start-up."""
    rank_hours: float | None
    """Sum over the updates of their time and the ranks that their phase uses, in hours; None: ranks not on record."""

    @classmethod
    def of(cls, run: RunFiles) -> RunCost:
        """Return the cost of a run."""
        hours = number(float(run.rank_hours.sum()))
        return cls(run.updates, run.samples, float(run.record_seconds.sum()), hours)

    @classmethod
    def mean(cls, runs: list[RunFiles]) -> RunCost:
        """Return the mean of at least one run."""
        costs = [cls.of(run) for run in runs]
        hours = [cost.rank_hours for cost in costs if cost.rank_hours is not None]
        return cls(
            updates=fmean(cost.updates for cost in costs),
            samples=fmean(cost.samples for cost in costs),
            seconds=fmean(cost.seconds for cost in costs),
            rank_hours=fmean(hours) if len(hours) == len(costs) else None,
        )
