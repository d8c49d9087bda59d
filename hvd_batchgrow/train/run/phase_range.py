"""A link of a chain: some phases of a run, trained by just the ranks that they use."""

from __future__ import annotations

from pathlib import Path

from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint


def check_width(plan: Plan, phases: tuple[int, int], num_ranks: int) -> None:
    """Check that phases are there, and use just the ranks that are launched.

    Args:
        plan: of the whole run.
        phases: the first and the last of the link, from 1.
        num_ranks: how many are launched.

    Raises:
        JobError: they are not, or do not; with what would be right.
    """
    first, last = phases
    if plan.job.is_adaptive:
        fault = "a trigger makes the phases as it goes: train it as one job, without --phases"
        raise JobError([Fault("--phases", fault)], plan.job.name)
    if not 1 <= first <= last <= len(plan.layouts):
        fault = f"{first}-{last} of the {len(plan.layouts)} phases 1-{len(plan.layouts)} of this job"
        raise JobError([Fault("--phases", f"there is no {fault}")], plan.job.name)
    # A phase that the one before has jumped over has no updates: it needs no ranks.
    shared = zip(plan.schedule.phases[first - 1 : last], plan.layouts[first - 1 : last], strict=True)
    wanted = {layout.ranks for phase, layout in shared if phase.num_updates}
    if wanted - {num_ranks}:
        told = ", ".join(map(str, sorted(wanted)))
        fault = f"{first}-{last} are planned for {told} ranks, and {num_ranks} are launched"
        remedy = f"launch {told}" if len(wanted) == 1 else "start phases of different ranks apart"
        raise JobError([Fault("--phases", f"{fault}: {remedy}")], plan.job.name)


def check_reached(plan: Plan, phases: tuple[int, int] | None, checkpoint: Checkpoint | None, folder: Path) -> None:
    """Check that the run has come to the first phase of a link.

    Raises:
        RunError: it has not.
    """
    if phases is None:
        return
    start = plan.schedule.phases[phases[0] - 1].start_samples
    samples = checkpoint.samples if checkpoint else 0
    if samples < start:
        raise RunError(
            f"--phases {phases[0]}-{phases[1]} begin at sample {start:,}, and {folder} stands at {samples:,}: "
            f"train the phases before them first (--phases 1-{phases[0] - 1})"
        )


def end_of(plan: Plan, phases: tuple[int, int] | None) -> int | None:
    """Sample counter at which a link ends; None: where the run does."""
    return None if phases is None else plan.schedule.phases[phases[1] - 1].end_samples
