"""Warn before the run if a batch that should grow cannot, and suggest values that let it grow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import (
    AdaBatchSchedule,
    AdaptiveSchedule,
    BoundaryBase,
    DecaySchedule,
    HybridSchedule,
    StepsSchedule,
)
from hvd_batchgrow.config.triggers import AdaScaleTrigger, NoTrigger, PlateauTrigger
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.policies import Start, make_start

_COUNTABLE = 1e6
"""Most evaluations that are counted; with more, `trigger_faults` compares the patience with the whole run."""


def growth_notes(job: Job, num_samples: int, phases: Sequence[Phase]) -> list[str]:
    """Return why the batch never grows, or not even once by the requested factor; empty if it does.

    Args:
        job: the job.
        num_samples: N.
        phases: the job's compiled phases, before any decision of a trigger.
    """
    section = job.schedule
    if isinstance(section, (DecaySchedule, StepsSchedule)) or isinstance(job.trigger, AdaScaleTrigger):
        return []  # the job file states their batch
    start = make_start(job, num_samples)
    if isinstance(section, AdaptiveSchedule):
        return _adaptive_notes(job, start)
    batches = [phase.global_batch for phase in phases if phase.num_updates]
    if len(batches) < 2:
        return [f"the batch never grows: {_no_boundary(job)}"]
    wanted = next((phase.wanted_batch for phase in phases[1:] if phase.wanted_batch > batches[0]), float(batches[0]))
    if max(batches) > batches[0]:
        # The plan shows cut batches. A batch that does not even double probably has a limit for another data set.
        return _cut_note(job, start, wanted, "boundary") if max(batches) < 2 * batches[0] else []
    instead = ", and the learning rate decays instead at every boundary" if wanted > batches[0] else ""
    return [f"the batch never grows{instead}: {_why(job, start, wanted)}"]


def _adaptive_notes(job: Job, start: Start) -> list[str]:
    trigger = job.trigger
    assert not isinstance(trigger, (NoTrigger, AdaScaleTrigger))
    is_plateau = isinstance(trigger, PlateauTrigger)
    factor = trigger.noise_factor if isinstance(trigger, PlateauTrigger) else trigger.max_batch_factor
    wanted = _wanted_first(start, factor)
    if isinstance(trigger, PlateauTrigger) and _comes_too_late(job, trigger):
        every, patience = job.evaluation.every_epochs, trigger.patience_epochs
        why = f"evaluation.every_epochs = {every:g} and trigger.patience_epochs = {patience:g}"
        return [f"the batch never grows: the {job.schedule.epochs:g} epochs end before the first decision, by {why}"]
    if start.max_batch is None or start.max_batch >= start.global_batch + start.batch_unit:
        return _cut_note(job, start, wanted, "decision") if is_plateau else []
    effect = (
        "every decision of the trigger lowers the learning rate instead"
        if is_plateau
        else f"no decision of the trigger {trigger.name!r} is possible"
    )
    return [f"the batch never grows, and {effect}: {_why(job, start, wanted)}"]


def _wanted_first(start: Start, factor: float) -> float:
    """Return the batch, in samples, that divides the noise scale by a factor; N if it overflows."""
    noise, most = start.noise.of(start.lr, start.momentum, start.global_batch), float(start.noise.num_samples)
    try:
        return min(start.noise.batch_for(noise / factor, start.momentum, start.lr), most)
    except ArithmeticError:
        return most


def _comes_too_late(job: Job, trigger: PlateauTrigger) -> bool:
    """Return whether the time from the first to the last evaluation before the end is at most the patience."""
    every, epochs = job.evaluation.every_epochs, job.schedule.epochs
    if trigger.windows_epochs or epochs / every > _COUNTABLE:
        return False
    num_before_end = math.ceil(epochs / every - 1e-9) - 1
    return (num_before_end - 1) * every <= trigger.patience_epochs + 1e-9


def _cut_note(job: Job, start: Start, wanted: float, when: str) -> list[str]:
    """Return a note if the limit cuts the first growth."""
    cap = start.max_batch
    if cap is None or wanted <= cap + start.batch_unit / 2:
        return []
    rest = f"it grows to at most {cap}, and the learning rate decays by the rest"
    return [f"the first {when} requests a batch of {wanted:.6g}: {rest}: {_limit(job, start)}{_remedy(start, wanted)}"]


def _no_boundary(job: Job) -> str:
    section = job.schedule
    if isinstance(section, BoundaryBase) and not section.boundaries_epochs:
        return "schedule.boundaries_epochs is empty"
    return "no boundary comes before the end of the run; lower its epochs, or train for longer"


def _why(job: Job, start: Start, wanted: float) -> str:
    section, first, unit = job.schedule, start.global_batch, start.batch_unit
    if isinstance(section, HybridSchedule) and not section.growing_boundaries:
        return "schedule.growing_boundaries is 0"
    if start.max_batch is not None and start.max_batch < first + unit:
        return f"{_limit(job, start)}{_remedy(start, wanted)}"
    if wanted <= first:
        key = "batch_factor" if isinstance(section, AdaBatchSchedule) else "noise_factor"
        return f"schedule.{key} does not enlarge the batch"
    return f"the requested {wanted:.6g} is rounded to {first}, a whole multiple of {unit}; use a larger factor"


def _limit(job: Job, start: Start) -> str:
    given = getattr(job.schedule, "max_batch", None)
    shown = f"{given!r} = {start.max_batch}" if isinstance(given, str) else f"{given}"
    return f"schedule.max_batch = {shown}, with a first batch of {start.global_batch}"


def _remedy(start: Start, wanted: float) -> str:
    """Suggest a first batch or a limit that allows the requested first growth."""
    assert start.max_batch is not None
    factor = wanted / start.global_batch
    lower = int(start.max_batch / factor / start.batch_unit) * start.batch_unit if factor > 1 else 0
    least = int(-(-wanted // start.batch_unit)) * start.batch_unit
    ways = [f"global_batch <= {lower}"] if lower else []
    ways += [f"max_batch >= {least}"] if factor > 1 and least < start.noise.num_samples else []
    return f"; for growth use {', or '.join(ways)}" if ways else "; the training set is too small for its growth"
