"""Cost of a run so far: updates, samples, time, rank-hours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvd_batchgrow.results.run_files import RunFiles


@dataclass(frozen=True)
class RunCost:
    """Cost of a run, or mean cost of several runs."""

    updates: float
    samples: float
    seconds: float
    """Time of the updates on record, without evaluations, checkpoints and start-up."""
    rank_hours: float
    """Sum over the updates of their time and the ranks that their phase uses, in hours."""

    @classmethod
    def of(cls, run: RunFiles) -> RunCost:
        """Return the cost of a run."""
        return cls(run.updates, run.samples, float(run.record_seconds.sum()), float(np.nansum(run.rank_hours)))

    @classmethod
    def mean(cls, runs: list[RunFiles]) -> RunCost:
        """Return the mean of at least one run."""
        costs = [cls.of(run) for run in runs]
        names = ("updates", "samples", "seconds", "rank_hours")
        return cls(*(float(np.mean([getattr(cost, name) for cost in costs])) for name in names))
