"""A round of branches: the run pauses, its ranks train the branches from its checkpoint, and rank 0 compares them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.branches import BranchRequest, branch_point
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.schedule.trigger import NO_EVIDENCE, Evidence
from hvd_batchgrow.schedule.triggers.branch import BranchRule
from hvd_batchgrow.train.events import BranchesCompared, BranchStarted, ObserverList, RunEnded
from hvd_batchgrow.train.liveness.stop import Stop
from hvd_batchgrow.train.liveness.watchdog import Heartbeat
from hvd_batchgrow.train.run.branch_folders import Branch, branches_of

if TYPE_CHECKING:
    from hvd_batchgrow.results.branching import Branching

TrainBranch = Callable[[dict[str, Any], Ranks, Stop], RunEnded]
"""Trains a branch, or resumes it. All ranks call it together with the same `Branch.work`."""


class BranchRounds:
    """Trains the branches of a run while it pauses.

    They are the run folders that `branch` makes, so `branch` shows them later, and a resumed round finds those that
    are finished.

    Args:
        run: folder of the run.
        observers: of the run.
        train: trains a branch.
        heartbeat: receives the stages of this rank.
    """

    def __init__(self, run: Path, observers: ObserverList, train: TrainBranch, heartbeat: Heartbeat) -> None:
        self._run, self._observers, self._train, self._heartbeat = run, observers, train, heartbeat

    def run(self, ranks: Ranks, plan: Plan, samples: int, rule: BranchRule, stop: Stop) -> Evidence | None:
        """Train the branches that are not finished, and compare all; return None if a stop was requested.

        All ranks call it together, after rank 0 has written the checkpoint.

        Args:
            ranks: those that train the run here.
            plan: of the run, with the decisions so far.
            samples: sample counter of the checkpoint.
            rule: the run's.
            stop: whether a stop is requested on this rank.

        Raises:
            CollectiveError: a branch cannot be trained, or its records cannot be read.
        """
        begin = time.perf_counter()
        self._heartbeat.at("preparing a branch")
        point = branch_point(plan.job, plan.decisions, plan.num_samples, samples)
        wanted = rule.request(point.global_batch)
        assert wanted is not None
        branches = ranks.run_on_rank0(lambda: branches_of(self._run, point, wanted, ranks.size))
        works = broadcast_object(ranks, branches and [branch.work() for branch in branches], "branches")
        for factor, work in zip(wanted.factors, works, strict=True):
            if ranks.any(flag=stop.stop_requested or ranks.stop_requested_elsewhere()):
                return None
            if work["is_done"]:
                continue
            self._heartbeat.at("preparing a branch")
            end = samples + wanted.num_samples
            self._observers.notify("on_branch", BranchStarted(samples, factor, factor * point.global_batch, end))
            if not self._train(work, ranks, stop).done:
                return None

        def compare() -> Evidence:
            assert branches is not None
            numbers, text, table = _compared(branches, wanted, samples, rule.tolerance)
            seconds = time.perf_counter() - begin
            event = BranchesCompared(samples, point.global_batch, wanted.num_samples, seconds, text, table)
            self._observers.notify("on_branches", event)
            return numbers, text

        self._heartbeat.at("comparing the branches")
        return ranks.run_on_rank0(compare) or NO_EVIDENCE


def _compared(
    branches: tuple[Branch, ...], wanted: BranchRequest, samples: int, tolerance: float | None
) -> tuple[dict[str, float], str, dict[str, Any]]:
    """Return what finished branches show: as numbers, in words, and as a table."""
    from hvd_batchgrow.results.branching import compare_branches, read_branch  # scipy, which no other job needs

    records = [read_branch(branch.folder, branch.factor, samples) for branch in branches]
    try:
        found = compare_branches(records, wanted.block, tolerance)
    except RunError as error:  # the run's own batch diverges: no batch is known to be as good
        return {}, str(error), {}
    return evidence(found, wanted.num_samples), found.verdict(), found.to_dict()


def evidence(found: Branching, branch_samples: int) -> dict[str, float]:
    """Return the numbers that a decision records: the critical batch, and of each factor k the loss difference.

    A branch whose loss was not finite has no difference.
    """
    numbers = {"critical_batch": float(found.critical_batch), "branch_samples": float(branch_samples)}
    for result in found.results[1:]:
        name = f"k{result.record.factor}"
        if (difference := result.difference) is not None:
            numbers |= {f"{name}_difference": difference.mean, f"{name}_low": difference.low}
            numbers[f"{name}_high"] = difference.high
        numbers[f"{name}_is_not_worse"] = float(result.is_not_worse)
    return numbers
