"""The branches of a run: where they are, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.results.changed_settings import changes
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.schedule.adaptive.decisions import read_decisions
from hvd_batchgrow.schedule.branches import (
    BranchLrRule,
    BranchPoint,
    BranchRequest,
    branch_point,
    branch_request,
    branches_folder,
    lr_text,
    plan_branch,
)
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.checkpoints.checkpoint_names import saved_samples


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

    @property
    def folder(self) -> Path:
        """Folder that holds the branches."""
        return self.branches[0].folder.parent

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
        RunError: the run cannot be read, a branch that exists is of another job, or a new one has no checkpoint.
    """
    plan = read_plan(run)
    job, start = load_job(run / "job.toml"), _checkpoint(run, at, plan["end_samples"])
    decided = run / "decisions.jsonl"
    decisions = read_decisions(decided)[1] if job.is_adaptive and decided.exists() else ()
    point = branch_point(job, decisions, plan["num_samples"], start)
    wanted = branch_request(point, factors, samples, rule)
    branches = branches_of(run, point, wanted, ranks)
    _check_start(run, start, branches)
    return BranchSetup(run, point, wanted, samples, branches)


def branches_of(run: Path, point: BranchPoint, wanted: BranchRequest, ranks: int) -> tuple[Branch, ...]:
    """Return the requested branches of a run, by ascending factor, on a number of ranks. Raises as `set_up`."""
    folder = run / "branches" / branches_folder(point.samples, wanted.num_samples, wanted.lr_rule)
    plans = [plan_branch(point, wanted, factor, ranks) for factor in wanted.factors]
    pairs = zip(wanted.factors, plans, strict=True)
    return tuple(_branch(run, folder, point, factor, plan) for factor, plan in pairs)


def _checkpoint(run: Path, at: int | None, end: int) -> int:
    """Return the sample counter of the checkpoint to start from.

    It may be gone if a branch has begun there: that branch has its own checkpoints.
    """
    if at is not None and at < end and any((run / "branches").glob(f"at-{at}-for-*/k*/job.toml")):
        return at
    saved = [samples for samples in saved_samples(run / "checkpoints") if samples < end]
    if not saved:
        raise RunError(f"{run} holds no checkpoint before its end at sample {end:,}: nothing to branch from")
    if at is not None and at not in saved:
        known = ", ".join(map(str, saved))
        fault = f"{run} has no checkpoint at sample {at} before its end; there are checkpoints at {known}"
        raise JobError([Fault("--at", fault)], "command line")
    return saved[-1] if at is None else at


def _check_start(run: Path, start: int, branches: Sequence[Branch]) -> None:
    """Raise RunError if a branch has not begun, and its checkpoint is gone."""
    new = [branch.factor for branch in branches if not branch.exists]
    if not new or start in saved_samples(run / "checkpoints"):
        return
    begun = ",".join(str(branch.factor) for branch in branches if branch.exists)
    remedy = f"only --factors {begun} can continue" if "," in begun else "choose another --at"
    factors = ", ".join(map(str, new))
    raise RunError(f"{run} no longer has its checkpoint at sample {start:,}, where k = {factors} must start: {remedy}")


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
    if changed := changes(before, now):
        raise RunError(f"{folder} was trained with another {', '.join(changed)}: remove it, and run branch again")
