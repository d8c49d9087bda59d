"""The one pass over a job that finds its faults: of its keys, then of its start, its stages and their layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.policy import compile_stages
from hvd_batchgrow.schedule.stage_layouts import ChooseRanks, layouts_for
from hvd_batchgrow.schedule.stages import Stage, Start, make_start
from hvd_batchgrow.schedule.validation.key_checks import impossible_faults, key_faults
from hvd_batchgrow.schedule.validation.stage_checks import stage_faults, start_faults


@dataclass(frozen=True)
class CheckedStages:
    """Stages without faults, and their layouts for a number of ranks."""

    start: Start
    stages: tuple[Stage, ...]
    epochs: float
    """Epoch at which the run ends."""
    layouts: tuple[Layout, ...]
    """One per stage."""


def check_job(
    job: Job, ranks: int, num_samples: int, choose_ranks: ChooseRanks | None, decisions: Sequence[Decision]
) -> CheckedStages:
    """Compile a job to stages and layouts, and check it on the way.

    Args and errors as `compile_plan`.
    """
    faults = [] if ranks >= 1 else [Fault("ranks", f"must be at least 1, got {ranks}")]
    faults += key_faults(job, num_samples)
    if impossible := impossible_faults(job, num_samples):
        raise JobError(faults + impossible, job.name)
    try:
        start = make_start(job, num_samples)
        faults += start_faults(job, start, ranks)
        stages, epochs = compile_stages(job, start, decisions)
        if not all(0 < stage.lr < math.inf for stage in stages):
            raise ArithmeticError("a learning rate of 0 or infinity")
        faults += stage_faults(job, start, stages)
        layouts = layouts_for(stages, job, max(1, ranks), choose_ranks)
        if not faults:
            return CheckedStages(start, tuple(stages), epochs, layouts)
    except JobError as error:
        faults += error.faults
    except ArithmeticError as error:
        faults.append(Fault("schedule", f"its numbers leave the range of floating point ({error})"))
    raise JobError(_without_repeats(faults), job.name)


def _without_repeats(faults: list[Fault]) -> list[Fault]:
    """Drop faults that repeat the message of an earlier phase."""
    seen: dict[str, Fault] = {}
    for fault in faults:
        seen.setdefault(fault.message if fault.path.startswith("phase ") else str(fault), fault)
    return list(seen.values())
