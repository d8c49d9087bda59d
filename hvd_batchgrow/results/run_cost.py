"""Cost of a run so far: updates, samples, time, rank-hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from hvd_batchgrow.results.account import account_of
from hvd_batchgrow.results.records import number, whole
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.storage.json_lines import Line


@dataclass(frozen=True)
class RunCost:
    """Cost of a run, or mean cost of several runs, with the branches that a trigger trained in pauses of the run."""

    updates: float
    samples: float
    seconds: float
    """Time of the updates on record, without evaluations, checkpoints and start-up; and of the pauses for branches."""
    rank_hours: float | None
    """That time in hours, times the ranks that trained then; None: ranks not on record."""
    branch_updates: float = 0.0
    """Those of `updates` that are the branches'."""

    @classmethod
    def of(cls, run: RunFiles) -> RunCost:
        """Return the cost of a run."""
        branches = _branches(run)
        branch_updates = sum(num_samples // batch for batch, num_samples in branches)
        pauses_s = account_of(run).branches_s + _pauses_before_fork_s(run)
        pause_hours = pauses_s * _pause_ranks(run) / 3600 if pauses_s else 0.0
        return cls(
            updates=run.updates + branch_updates,
            samples=run.samples + sum(num_samples for _, num_samples in branches),
            seconds=float(run.record_seconds.sum()) + pauses_s,
            rank_hours=number(float(run.rank_hours.sum()) + pause_hours),
            branch_updates=branch_updates,
        )

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
            branch_updates=fmean(cost.branch_updates for cost in costs),
        )


def _branches(run: RunFiles) -> list[tuple[int, int]]:
    """Return the batch and the number of samples of each branch; one that a resume continued has several lines."""
    found = {(line["samples"], batch): (batch, count) for line in run.branches for batch, count in _named(line)}
    return [(batch, count) for batch, count in found.values() if batch]


def _pauses_before_fork_s(run: RunFiles) -> float:
    """Return the time of the branches that the origin of a fork trained; its attempts are not on the fork's record."""
    end = run.forked_from.samples if run.forked_from else 0
    return sum(max(number(line.get("seconds")) or 0.0, 0.0) for line in run.branches if line["samples"] <= end)


def _named(line: Line) -> Iterator[tuple[int, int]]:
    """Yield the batch and the number of samples of each branch that a line names; 0 for damaged values."""
    if line.get("kind") == "branch":
        count = whole(line.get("end_samples"), 0, 0) - line["samples"]
        yield whole(line.get("global_batch"), 1, 0), max(count, 0)
    table = line.get("table")
    branches = table.get("branches") if isinstance(table, dict) else None
    for branch in branches if isinstance(branches, list) else ():
        if isinstance(branch, dict):
            yield whole(branch.get("global_batch"), 1, 0), whole(line.get("branch_samples"), 0, 0)


def _pause_ranks(run: RunFiles) -> float:
    """Return the mean number of ranks in the pauses of a run, by their time; NaN if ranks are not on record."""
    ends, ranks = run.column("samples"), run.column("ranks")
    if not len(ends) or not run.branches:
        return float("nan")
    pauses = [line["samples"] for line in run.branches]
    weights = [max(number(line.get("seconds")) or 0.0, 1e-9) for line in run.branches]  # the result has the time
    return float(np.average(ranks[np.minimum(np.searchsorted(ends, pauses), len(ends) - 1)], weights=weights))
