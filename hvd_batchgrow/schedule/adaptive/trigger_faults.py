"""Faults of an adaptive schedule that can be found before the run measures anything."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import AdaptiveSchedule
from hvd_batchgrow.config.triggers import AdaScaleTrigger, MeasuringTrigger, NoTrigger, PlateauTrigger
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.policies import Stage, apply_lr_rule, batch_cap, batch_unit, make_start
from hvd_batchgrow.schedule.rounding import half_up


def trigger_faults(job: Job, ranks: int, num_samples: int) -> list[Fault]:
    """Return the faults of `[trigger]`, of its related keys, of the batches that it may request, and of
    `[gradient_noise]`."""
    faults = []
    if job.gradient_noise.preconditioned and job.optim.name not in {"adam", "adamw"}:
        fault = f"is for optim.name = 'adam' or 'adamw', not {job.optim.name!r}"
        faults.append(Fault("gradient_noise.preconditioned", fault))
    measures = job.gradient_noise.measure or isinstance(job.trigger, MeasuringTrigger | AdaScaleTrigger)
    if job.gradient_noise.per_layer_group and not measures:
        fault = "has no effect if nothing is measured: set gradient_noise.measure = true too"
        faults.append(Fault("gradient_noise.per_layer_group", fault))
    section, trigger = job.schedule, job.trigger
    if not isinstance(section, AdaptiveSchedule):
        if isinstance(trigger, NoTrigger):
            return faults
        fault = f"{trigger.name!r} has no effect with policy = {section.policy!r}; use 'adaptive'"
        return [*faults, Fault("trigger.name", fault)]
    if isinstance(trigger, NoTrigger):
        fault = "schedule.policy = 'adaptive' needs a trigger: plateau, norm_test, cabs, …"
        return [*faults, Fault("trigger.name", fault)]
    faults += _unit_faults(job, ranks, num_samples)
    if job.layout.grow_by == "auto" or job.layout.ranks_per_phase:
        key = "layout.grow_by" if job.layout.grow_by == "auto" else "layout.ranks_per_phase"
        faults.append(
            Fault(key, "needs to know the phases in advance; with a trigger use grow_by = 'accumulation' or 'ranks'")
        )
    faults += _rule_faults(job, num_samples)
    if section.batch_scale != 1 and not isinstance(trigger, AdaScaleTrigger):
        fault = f"{section.batch_scale:g} is for trigger.name = 'adascale'; with other triggers use schedule.lr_scale"
        faults.append(Fault("schedule.batch_scale", fault))
    if isinstance(trigger, AdaScaleTrigger):
        faults += _adascale_faults(job, num_samples)
    epochs = (0.0, *section.lr_boundaries_epochs, section.epochs)
    faults += [
        Fault("schedule.lr_boundaries_epochs", f"must rise and end before {section.epochs:g}: {b:g} follows {a:g}")
        for a, b in itertools.pairwise(epochs)
        if b <= a
    ]
    edges = [edge for window in getattr(trigger, "windows_epochs", None) or () for edge in window]
    faults += [
        Fault("trigger.windows_epochs", f"[earliest, latest] must rise from window to window: {b:g} follows {a:g}")
        for k, (a, b) in enumerate(itertools.pairwise(edges))
        if b < a or (b == a and k % 2)
    ]
    if edges and edges[-1] >= section.epochs:
        faults.append(Fault("trigger.windows_epochs", f"{edges[-1]:g} is not before epochs = {section.epochs:g}"))
    if not isinstance(trigger, PlateauTrigger):
        faults += _gradient_faults(job, ranks)
    if isinstance(trigger, MeasuringTrigger) and trigger.min_factor > trigger.max_batch_factor:
        most = f"max_batch_factor = {trigger.max_batch_factor:g}"
        fault = f"{trigger.min_factor:g} is above {most}: the batch would never grow"
        faults.append(Fault("trigger.min_factor", fault))
    return faults + _factor_faults(job, num_samples) + _span_faults(job)


def _adascale_faults(job: Job, num_samples: int) -> list[Fault]:
    """Return the faults of AdaScale: the gain alone scales the learning rate, and the batch must be larger than B₀."""
    section = job.schedule
    assert isinstance(section, AdaptiveSchedule)
    others: dict[str, tuple[object, object]] = {
        "lr_scale": (section.lr_scale, 1.0),
        "raise_momentum_to": (section.raise_momentum_to, None),
        "lr_rule": (section.lr_rule, "none"),
    }
    faults = [
        Fault(
            f"schedule.{key}", f"{value!r} is not for 'adascale', whose gain scales lr; remove it and use batch_scale"
        )
        for key, (value, default) in others.items()
        if value != default
    ]
    base, unit = section.global_batch, batch_unit(job)
    formed, cap = half_up(section.batch_scale * base / unit) * unit, batch_cap(section.max_batch, num_samples, unit)
    if formed <= base:
        fault = f"{section.batch_scale:g} × {base} is formed as {formed}: the gain would always be 1; nearest: "
        faults.append(Fault("schedule.batch_scale", f"{fault}{(base + unit) / base:g}"))
    elif cap is not None and base <= cap < formed:
        fault = f"{section.batch_scale:g} × {base} = {formed} is above schedule.max_batch = {section.max_batch}"
        faults.append(Fault("schedule.batch_scale", f"{fault}, {cap} samples; nearest: {cap / base:g}"))
    return faults


def _span_faults(job: Job) -> list[Fault]:
    """Return faults if the time before the first decision is as long as the run. The end of a window decides anyway."""
    section, trigger = job.schedule, job.trigger
    assert isinstance(section, AdaptiveSchedule)
    if getattr(trigger, "windows_epochs", None):
        return []
    most = section.epochs * section.batch_scale  # the longest run: with AdaScale at a gain of 1
    spans = {key: getattr(trigger, key, 0.0) for key in ("patience_epochs", "hold_epochs")}
    if min((job.evaluation.every_epochs, *section.lr_boundaries_epochs)) >= most:  # a trigger also measures there
        spans["every_epochs"] = getattr(trigger, "every_epochs", 0.0)
    return [
        Fault(f"trigger.{key}", f"{span:g} is not below the run's {most:g} epochs: it would never decide; use less")
        for key, span in spans.items()
        if span >= most
    ]


def _unit_faults(job: Job, ranks: int, num_samples: int) -> list[Fault]:
    """Return faults unless these ranks can form every multiple of the unit: a decision cannot be refused later."""
    assert isinstance(job.schedule, AdaptiveSchedule)
    unit, group, faults = batch_unit(job), job.model.ghost_batch, []
    every = group if job.layout.uneven_ranks or job.layout.grow_by == "ranks" else group * max(1, ranks)
    if unit % every:
        lower = unit // every * every
        nearest = f"{lower} or {lower + every}" if lower else f"{every}"
        why = f"ghost batches of {group}" + (f" on {ranks} ranks" if every != group else "")
        fault = f"{unit} = {unit / every:.2f} × {every}, {why}; nearest: {nearest}"
        faults.append(
            Fault("schedule.batch_multiple", fault + ("" if every == group else "; or layout.uneven_ranks = true"))
        )
    first = job.schedule.global_batch
    if first % unit:
        below = f"{first // unit * unit}, " if first > unit else ""
        fault = f"{first} = {first / unit:.2f} × {unit}, but every batch must be a multiple of {unit}"
        faults.append(Fault("schedule.global_batch", f"{fault}; nearest: {below}{(first // unit + 1) * unit}"))
    cap = batch_cap(job.schedule.max_batch, num_samples, unit)
    if cap is not None and cap % unit:
        fault = f"{cap} = {cap / unit:.2f} × {unit}, but every batch must be a multiple of {unit}"
        nearest = f"nearest: {cap // unit * unit}, {(cap // unit + 1) * unit}; or set batch_multiple"
        faults.append(Fault("schedule.max_batch", f"{fault}; {nearest}"))
    return faults


def _factor_faults(job: Job, num_samples: int) -> list[Fault]:
    """Return a fault if rounding cancels `max_batch_factor`: then not even the end of a window grows the batch."""
    if not isinstance(job.trigger, MeasuringTrigger):
        return []
    try:
        start = make_start(job, num_samples)
    except (JobError, ArithmeticError):
        return []  # reported where the schedule is compiled
    first, unit, factor = start.global_batch, start.batch_unit, job.trigger.max_batch_factor
    if start.whole(factor * first) > first:
        return []
    fault = f"{factor:g} × {first} = {factor * first:g} is below {first + unit}, the next whole multiple of {unit}"
    remedy = f"nearest: {(first + unit) / first:g}; or a smaller schedule.batch_multiple"
    return [Fault("trigger.max_batch_factor", f"{fault}: the batch would never grow; {remedy}")]


def _rule_faults(job: Job, num_samples: int) -> list[Fault]:
    """Return the faults of the learning-rate rule at the largest possible batch."""
    try:
        start = make_start(job, num_samples)
        first = Stage(0.0, start.lr, start.momentum, start.global_batch, float(start.global_batch))
        apply_lr_rule([first, replace(first, global_batch=start.max_batch or num_samples)], job)
    except JobError as error:
        return list(error.faults)
    except ArithmeticError:
        return []  # reported where the schedule is compiled
    return []


def _gradient_faults(job: Job, ranks: int) -> list[Fault]:
    """Return a fault if an update has only one gradient: tr(Σ) needs the difference between at least two."""
    assert isinstance(job.schedule, AdaptiveSchedule)
    batch = half_up(job.schedule.global_batch * job.schedule.batch_scale)
    if (ranks > 1 and job.layout.grow_by != "ranks") or batch > job.micro_batch_limit:
        return []
    return [one_gradient(job, batch)]


def one_gradient(job: Job, batch: int) -> Fault:
    """Return the fault of a batch that is one micro-batch on one rank: the reason and a remedy."""
    group, limit = job.model.ghost_batch, job.micro_batch_limit
    half = max(group, batch // 2 // group * group)
    if half == batch:
        fault = f"{batch} is one ghost batch, so an update has one gradient: tr(Σ) needs two; use >= {2 * group}"
        return Fault("schedule.global_batch", fault)
    fault = f"{limit} makes a batch of {batch} one micro-batch: tr(Σ) needs two gradients; use {half}, or 2 ranks"
    return Fault("layout.max_micro_batch", fault)
