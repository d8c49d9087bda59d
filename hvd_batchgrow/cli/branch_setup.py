"""The branches of a run as `branch` trains them: what they cost, and how one is trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_batchgrow.cli.common import terminal
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.observers.branch_tables import BranchCost
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.step_times import recorded_times
from hvd_batchgrow.schedule.branches import only_branch
from hvd_batchgrow.schedule.cost.cost import predict
from hvd_batchgrow.schedule.cost.cost_file import load_cost_file
from hvd_batchgrow.schedule.cost.time_left import phase_sizes
from hvd_batchgrow.train.run.branch_folders import BranchSetup

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.train.events import RunEnded
    from hvd_batchgrow.train.liveness.stop import Stop


def train_branch(work: dict[str, Any], ranks: Ranks, stop: Stop) -> RunEnded:
    """Train a branch, or resume it. All ranks call it together with the same `Branch.work`."""
    from hvd_batchgrow.cli.train import run_observers
    from hvd_batchgrow.observers.progress import work_progress
    from hvd_batchgrow.train.run.fork import Origin
    from hvd_batchgrow.train.run.run import RunOptions, run_job

    origin = None if work["exists"] else Origin(Path(work["origin"]), work["start"])
    options = RunOptions(Path(work["runs_dir"]), resume=work["exists"], fork_from=origin)
    console = terminal(sys.stderr, quiet=ranks.local_rank != 0)
    with work_progress(console) as report, ExitStack() as stack:
        load = lambda: parse_job(work["job"])  # noqa: E731
        return run_job(load, ranks, options, report, lambda job: run_observers(job, console, stack), stop)


def ranks_of_run(run: Path) -> int:
    """Return the number of ranks that a run used last; 1 if that is unknown."""
    return ranks_of_attempt(RunFiles.read(run).last_attempt)


def ranks_of_attempt(attempt: Mapping[str, Any]) -> int:
    """Return the number of ranks of an attempt; 1 if that is unknown."""
    ranks = attempt.get("ranks")
    return ranks if type(ranks) is int and ranks > 0 else 1


def branch_costs(setup: BranchSetup, cost_file: Path | None) -> tuple[list[BranchCost], list[str]]:
    """Return what each branch will cost, and notes on the estimate.

    Args:
        setup: the branches.
        cost_file: the file of `--cost`; None: the step times on record in the run.

    Raises:
        JobError: the file is for another job.
        RunError: a file cannot be read.
    """
    seconds: list[float | None]
    phases = [only_branch(branch.plan) for branch in setup.branches]
    if cost_file is not None:
        figures = load_cost_file(cost_file)
        costs = [predict(plan, figures) for plan in phases]
        seconds, notes = [cost.seconds for cost in costs], [note for cost in costs for note in cost.notes]
    else:
        times = recorded_times(RunFiles.read(setup.run))
        found = [times.seconds(phase_sizes(branch.plan), branch.start) for branch in setup.branches]
        seconds = [None if left is None else sum(left) for left in found]
        notes = _notes_on_records(times.num_sizes)
    rows = [
        BranchCost(
            branch.factor,
            plan.schedule.phases[0].global_batch,
            plan.schedule.phases[0].lr,
            plan.schedule.phases[0].num_updates,
            plan.layouts[0].ranks,
            spent,
            branch.is_done,
        )
        for branch, plan, spent in zip(setup.branches, phases, seconds, strict=True)
    ]
    return rows, list(dict.fromkeys([*notes, "without start-up, evaluation and checkpoints"]))


def _notes_on_records(num_sizes: int) -> list[str]:
    if num_sizes == 0:
        return ["the run has no step times on record; --cost PROBE.json predicts them"]
    if num_sizes == 1:
        return ["time as if proportional to the samples: the run has updates of one size only"]
    return []
