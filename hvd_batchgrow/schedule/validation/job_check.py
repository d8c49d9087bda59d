"""The one pass over a job that finds its faults: of its keys, then of its start, its stages and their layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.layout import MOST_EXACT_GHOST_BATCHES
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.batch_unit import unit_faults
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.policy import compile_stages, policy_of
from hvd_batchgrow.schedule.rounding import half_up
from hvd_batchgrow.schedule.stage_layouts import ChooseRanks, layouts_for
from hvd_batchgrow.schedule.stages import Stage, Start, make_start
from hvd_batchgrow.schedule.trigger import trigger_of
from hvd_batchgrow.schedule.validation.key_checks import impossible_faults, key_faults


def check_job(
    job: Job, ranks: int, num_samples: int, choose_ranks: ChooseRanks | None, decisions: Sequence[Decision]
) -> tuple[Start, list[Stage], float, tuple[Layout, ...]]:
    """Compile a job and check it on the way: return its start, stages, last epoch, and the layout of each stage.

    Args and errors as `compile_plan`.
    """
    faults = [] if ranks >= 1 else [Fault("ranks", f"must be at least 1, got {ranks}")]
    faults += key_faults(job, num_samples)
    if impossible := impossible_faults(job, num_samples):
        raise JobError(faults + impossible, job.name)
    try:
        start = make_start(job, num_samples)
        faults += _unit_faults(job, start)
        faults += _start_faults(job, start, ranks)
        stages, epochs = compile_stages(job, start, decisions)
        if not all(0 < stage.lr < math.inf for stage in stages):
            raise ArithmeticError("a learning rate of 0 or infinity")
        faults += _stage_faults(job, start, stages)
        layouts = layouts_for(stages, job, max(1, ranks), choose_ranks)
        if not faults:
            return start, stages, epochs, layouts
    except JobError as error:
        faults += error.faults
    except ArithmeticError as error:
        faults.append(Fault("schedule", f"its numbers leave the range of floating point ({error})"))
    raise JobError(_without_repeats(faults), job.name)


def _unit_faults(job: Job, start: Start) -> Iterator[Fault]:
    """Yield the faults of `batch_multiple` of a fixed schedule, whose ranks are checked in each phase."""
    if not job.is_adaptive and start.batch_unit != job.model.ghost_batch:
        yield from unit_faults(job, start, 1)


def _start_faults(job: Job, start: Start, ranks: int) -> Iterator[Fault]:
    """Yield the faults of the batches that a trigger may request, so that no decision must be refused later."""
    trigger = trigger_of(job)
    if not (job.is_adaptive and trigger.decides):
        return
    yield from policy_of(job).batch_faults(job, start, ranks)
    yield from trigger.batch_faults(job, start)
    batch = half_up(job.schedule.enlarged_batch)
    is_one = (ranks <= 1 or job.layout.grow_by == "ranks") and batch <= job.micro_batch_limit
    if trigger.measures_gradients and is_one and job.gradient_noise.estimator == "micro_batches":
        yield one_gradient(job, batch)


def one_gradient(job: Job, batch: int) -> Fault:
    """Return the fault of a batch that is one micro-batch on one rank: the reason and a remedy."""
    ghost_batch, limit = job.model.ghost_batch, job.micro_batch_limit
    half = max(ghost_batch, batch // 2 // ghost_batch * ghost_batch)
    if half == batch:
        fault = f"{batch} is one ghost batch, so an update has one gradient: tr(Σ) needs two; use >= {2 * ghost_batch}"
        return Fault("schedule.global_batch", fault)
    fault = f"{limit} makes a batch of {batch} one micro-batch: tr(Σ) needs two gradients; use {half}, or 2 ranks"
    return Fault("layout.max_micro_batch", f"{fault}, or gradient_noise.estimator = 'norm_layers'")


def _stage_faults(job: Job, start: Start, stages: Sequence[Stage]) -> Iterator[Fault]:
    """Yield the faults of the limit of the batch, and of the warm-up."""
    yield from _unlimited_growth(job, start, stages)
    start_lr, lr = job.schedule.warmup_start_lr, stages[0].lr
    if job.schedule.warmup_epochs and start_lr > lr:
        fault = f"{start_lr:g} is above the learning rate {lr:g}; nearest: {lr!r}"
        yield Fault("schedule.warmup_start_lr", fault)
    largest, ghost_batch = max(stage.global_batch for stage in stages), job.model.ghost_batch
    limit = MOST_EXACT_GHOST_BATCHES * ghost_batch
    if job.layout.exact and largest > limit:
        fault = f"adds at most {MOST_EXACT_GHOST_BATCHES:,} ghost batches per update, a batch of {largest:,} has"
        remedy = f"use a batch <= {limit:,}, a larger model.ghost_batch, or layout.exact = false"
        yield Fault("layout.exact", f"{fault} {largest // ghost_batch:,}: {remedy}")


def _unlimited_growth(job: Job, start: Start, stages: Sequence[Stage]) -> Iterator[Fault]:
    """Yield a fault for a batch above N/10 without a stated limit: there the noise deviates from its leading order.

    This includes a first batch that `lr_scale` or `raise_momentum_to` has enlarged.
    """
    section, limit, first = job.schedule, start.noise.num_samples / 10, job.schedule.first_batch
    largest = max(stages, key=lambda stage: stage.global_batch)
    if section.stated_limit is not None or largest.global_batch <= max(limit, first):
        return
    if "max_batch" in type(section).model_fields:
        yield Fault(
            "schedule.max_batch",
            f"is not set, and from epoch {largest.start_epoch:g} the batch would be {largest.global_batch}, "
            f'above N/10 = {limit:g}; set "N/10", or the number that you want',
        )
    elif stages[0].global_batch > first:
        key = "lr_scale" if section.lr_scale > 1 else "raise_momentum_to"
        fault = f"enlarges the batch of {first} to {largest.global_batch}, above N/10 = {limit:g}; use less, or "
        yield Fault(f"schedule.{key}", f"{fault}write that as global_batch, with its optim.lr and momentum")


def _without_repeats(faults: list[Fault]) -> list[Fault]:
    """Drop faults that repeat the message of an earlier phase."""
    seen: dict[str, Fault] = {}
    for fault in faults:
        seen.setdefault(fault.message if fault.path.startswith("phase ") else str(fault), fault)
    return list(seen.values())
