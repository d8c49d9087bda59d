"""A job of a chain: it trains some phases of a run on exactly the ranks that they use."""

from __future__ import annotations

from pathlib import Path

from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint


def check_width(plan: Plan, phases: tuple[int, int], num_ranks: int) -> None:
    """Check that phases exist, and that they use exactly the launched ranks.

    Args:
        plan: of the whole run.
        phases: the first and the last phase to train, from 1.
        num_ranks: number of launched ranks.

    Raises:
        JobError: a phase does not exist, or the number of ranks is wrong; the message names the right one.
    """
    first, last = phases
    if plan.job.is_adaptive:
        fault = "a trigger decides the phases during the run: train it as one job, without --phases"
        raise JobError([Fault("--phases", fault)], plan.job.name)
    if not 1 <= first <= last <= len(plan.layouts):
        fault = f"{first}-{last} of the {len(plan.layouts)} phases 1-{len(plan.layouts)} of this job"
        raise JobError([Fault("--phases", f"there is no {fault}")], plan.job.name)
    # A phase has no updates, and needs no ranks, if the last update of the phase before covers it.
    planned = {layout.ranks for k, _, layout in plan.trained_phases if first <= k <= last}
    if planned - {num_ranks}:
        counts = ", ".join(map(str, sorted(planned)))
        fault = f"{first}-{last} are planned for {counts} ranks, but the run has {counted(num_ranks, 'rank')}"
        remedy = f"launch {counts}" if len(planned) == 1 else "train phases with different numbers of ranks separately"
        raise JobError([Fault("--phases", f"{fault}: {remedy}")], plan.job.name)


def check_reached(plan: Plan, phases: tuple[int, int] | None, checkpoint: Checkpoint | None, folder: Path) -> None:
    """Check that the run has reached the first of the phases to train.

    Raises:
        RunError: it has not.
    """
    if phases is None:
        return
    start = plan.schedule.phases[phases[0] - 1].start_samples
    samples = checkpoint.samples if checkpoint else 0
    if samples < start:
        raise RunError(
            f"--phases {phases[0]}-{phases[1]} begin at sample {start:,}, but {folder} is at {samples:,}: "
            f"train the phases before them first (--phases 1-{phases[0] - 1})"
        )


def end_of(plan: Plan, phases: tuple[int, int] | None) -> int | None:
    """Return the sample counter at the end of the phases to train; None: at the end of the run."""
    return None if phases is None else plan.schedule.phases[phases[1] - 1].end_samples
