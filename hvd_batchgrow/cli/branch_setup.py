"""The branches of a run: where they are, which exist, what they cost, and how one is trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_batchgrow.cli.common import terminal
from hvd_batchgrow.job_file import load_job, parse_job
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.observers.branch_tables import BranchCost
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.step_times import recorded_times
from hvd_batchgrow.schedule.adaptive.decisions import read_decisions
from hvd_batchgrow.schedule.branches import (
    BranchLrRule,
    BranchPoint,
    BranchRequest,
    branch_point,
    branch_request,
    lr_text,
    plan_branch,
)
from hvd_batchgrow.schedule.cost.cost import predict
from hvd_batchgrow.schedule.cost.probe_file import load_probe
from hvd_batchgrow.schedule.cost.time_left import phase_sizes
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.checkpoints.checkpoint_names import saved_samples

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.train.events import RunEnded
    from hvd_batchgrow.train.liveness.stop import Stop


@dataclass(frozen=True)
class Branch:
    """A branch, trained or not."""

    factor: int
    plan: Plan
    origin: Path
    """Folder of the run that it starts from."""
    start: int
    """Sample counter of the checkpoint."""
    folder: Path
    """Its run folder."""
    exists: bool
    """Whether its training has begun."""
    is_done: bool

    def work(self) -> dict[str, Any]:
        """Return what all ranks need to train it, as plain values."""
        job = self.plan.job.model_dump(mode="json", exclude_none=True)
        own = {"start": self.start, "exists": self.exists, "is_done": self.is_done}
        return {"job": job, "origin": str(self.origin), "runs_dir": str(self.folder.parent), **own}


@dataclass(frozen=True)
class BranchSetup:
    """The branches of a run from one of its checkpoints."""

    run: Path
    point: BranchPoint
    wanted: BranchRequest
    requested: int | None
    """Requested samples of a branch, before rounding."""
    branches: tuple[Branch, ...]

    def lines(self) -> list[str]:
        """Return what will be compared, in words."""
        point, wanted = self.point, self.wanted
        epochs = wanted.num_samples / point.num_samples
        rounded = f"{self.requested:,} rounded up to " if self.requested not in {None, wanted.num_samples} else ""
        blocks = f"{rounded}{wanted.num_samples // wanted.block} blocks of {wanted.block:,}"
        where = f"{self.run} at sample {point.samples:,} (epoch {point.samples / point.num_samples:.2f})"
        return [
            f"{where}: batch B = {point.global_batch:,}, learning rate ε = {point.phase.lr:.4g}",
            f"each branch trains on the next {wanted.num_samples:,} samples ({epochs:.2f} epochs): {blocks}",
            f"batch k B, constant learning rate {lr_text(point, wanted.lr_rule)}",
            *([_LONG_BLOCKS] if self.requested is None and epochs > 1 else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        point, wanted = self.point, self.wanted
        return {
            "run": str(self.run),
            "samples": point.samples,
            "epoch": point.samples / point.num_samples,
            "global_batch": point.global_batch,
            "lr": point.phase.lr,
            "lr_rule": wanted.lr_rule,
            "branch_samples": wanted.num_samples,
            "block": wanted.block,
        }


_LONG_BLOCKS = (
    "half an epoch is less than 32 blocks here: smaller --factors, or a smaller batch (an earlier --at), need fewer"
)


def set_up(
    run: Path, at: int | None, factors: Sequence[int], samples: int | None, rule: BranchLrRule | None, ranks: int
) -> BranchSetup:
    """Return the branches of a run on a number of ranks.

    Args:
        run: the run folder.
        at: sample counter of the checkpoint; None: the newest one before the end of the run.
        factors: k of each branch.
        samples: of each branch, before rounding; None: the default.
        rule: of the learning rate; None: the default.
        ranks: number of ranks that train the branches.

    Raises:
        JobError: there is no such checkpoint, or a batch cannot be formed.
        RunError: the run cannot be read, or a branch that exists is of another job.
    """
    plan = read_plan(run)
    job, start = load_job(run / "job.toml"), _checkpoint(run, at, plan["end_samples"])
    decided = run / "decisions.jsonl"
    decisions = read_decisions(decided)[1] if job.is_adaptive and decided.exists() else ()
    point = branch_point(job, decisions, plan["num_samples"], start)
    wanted = branch_request(point, factors, samples, rule)
    folder = run / "branches" / f"at-{start}-for-{wanted.num_samples}-{wanted.lr_rule}"
    plans = [plan_branch(point, wanted, factor, ranks) for factor in wanted.factors]
    pairs = zip(wanted.factors, plans, strict=True)
    return BranchSetup(run, point, wanted, samples, tuple(_branch(run, folder, point, k, plan) for k, plan in pairs))


def _checkpoint(run: Path, at: int | None, end: int) -> int:
    """Return the sample counter of the checkpoint to start from."""
    saved = [samples for samples in saved_samples(run / "checkpoints") if samples < end]
    if not saved:
        raise RunError(f"{run} holds no checkpoint before its end at sample {end:,}: nothing to branch from")
    if at is not None and at not in saved:
        known = ", ".join(map(str, saved))
        fault = f"{run} has no checkpoint at sample {at} before its end; there are checkpoints at {known}"
        raise JobError([Fault("--at", fault)], "command line")
    return saved[-1] if at is None else at


def _branch(run: Path, parent: Path, point: BranchPoint, factor: int, plan: Plan) -> Branch:
    folder = parent / plan.job.name
    exists = (folder / "job.toml").exists()
    if exists:
        _refuse_other_job(folder, plan)
    is_done = exists and plan.schedule.end_samples in saved_samples(folder / "checkpoints")
    return Branch(factor, plan, run, point.samples, folder, exists, is_done)


def _refuse_other_job(folder: Path, plan: Plan) -> None:
    """Raise RunError if a branch has been trained with settings that differ from the run's now."""
    before = plan.job.completed(load_job(folder / "job.toml").deciding(plan.num_samples))
    now = plan.job.deciding(plan.num_samples)
    if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        raise RunError(f"{folder} was trained with another {', '.join(changed)}: remove it, and run branch again")


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
    attempts = RunFiles.read(run).attempts
    ranks = attempts[-1].get("ranks") if attempts else None
    return ranks if type(ranks) is int and ranks > 0 else 1


def branch_costs(setup: BranchSetup, probe: Path | None) -> tuple[list[BranchCost], list[str]]:
    """Return what each branch will cost, and notes on the estimate.

    Args:
        setup: the branches.
        probe: measured costs; None: the step times on record in the run.

    Raises:
        JobError: the probe is of another job.
        RunError: a file cannot be read.
    """
    seconds: list[float | None]
    phases = [_only_branch(branch.plan) for branch in setup.branches]
    if probe is not None:
        measured = load_probe(probe)
        costs = [predict(plan, measured) for plan in phases]
        seconds, notes = [cost.seconds for cost in costs], [note for cost in costs for note in cost.notes]
    else:
        times = recorded_times(RunFiles.read(setup.run))
        found = [times.seconds(phase_sizes(branch.plan), branch.start) for branch in setup.branches]
        seconds = [None if left is None else left[1] for left in found]
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


def _only_branch(plan: Plan) -> Plan:
    """Return a plan without the phases that the run has trained."""
    schedule = replace(plan.schedule, phases=plan.schedule.phases[-1:])
    return replace(plan, schedule=schedule, layouts=plan.layouts[-1:])
