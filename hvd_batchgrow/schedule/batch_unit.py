"""Faults of batches that must be whole multiples of a unit."""

from __future__ import annotations

from collections.abc import Iterator

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.stages import Start


def unit_faults(job: Job, start: Start, ranks: int) -> Iterator[Fault]:
    """Yield faults unless `ranks` can form every multiple of the unit, and the first batch and the limit are multiples.

    Args:
        job: the job.
        start: its start, with the unit.
        ranks: R; 1 if only ghost batches must stay whole.
    """
    ghost_batch, unit, first, cap = job.model.ghost_batch, start.batch_unit, job.schedule.first_batch, start.max_batch
    every = ghost_batch if job.layout.uneven_ranks or job.layout.grow_by == "ranks" else ghost_batch * max(1, ranks)
    if unit % every:
        lower = unit // every * every
        nearest = f"{lower} or {lower + every}" if lower else f"{every}"
        why = f"ghost batches of {ghost_batch}" + (f" on {ranks} ranks" if every != ghost_batch else "")
        fault = f"{unit} = {unit / every:.2f} × {every}, {why}; nearest: {nearest}"
        uneven = "" if every == ghost_batch else "; or layout.uneven_ranks = true"
        is_stated = job.schedule.stated_unit is not None or unit != first
        yield Fault(f"schedule.{'batch_multiple' if is_stated else 'global_batch'}", fault + uneven)
    if first % unit:
        below = f"{first // unit * unit}, " if first > unit else ""
        fault = f"{first} = {first / unit:.2f} × {unit}, but every batch must be a multiple of {unit}"
        yield Fault("schedule.global_batch", f"{fault}; nearest: {below}{(first // unit + 1) * unit}")
    if cap is not None and cap % unit:
        fault = f"{cap} = {cap / unit:.2f} × {unit}, but every batch must be a multiple of {unit}"
        nearest = f"nearest: {cap // unit * unit}, {(cap // unit + 1) * unit}; or set batch_multiple"
        yield Fault("schedule.max_batch", f"{fault}; {nearest}")
