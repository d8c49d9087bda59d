"""Faults of a job's keys that can be found before its phases are compiled."""

from __future__ import annotations

import itertools
import math

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.batch_steps import parse_batch_steps
from hvd_batchgrow.config.layout import KEYS_OF_GROW_BY
from hvd_batchgrow.config.optim import AdamSection
from hvd_batchgrow.config.schedules import (
    AdaptiveSchedule,
    BoundaryBase,
    DecaySchedule,
    HybridSchedule,
    ImportSchedule,
    StepsSchedule,
)
from hvd_batchgrow.config.triggers import PlateauTrigger
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.layout import cut_groups
from hvd_batchgrow.schedule.policies import batch_cap, batch_unit, first_batch
from hvd_batchgrow.schedule.rounding import samples_at

_MOST_SAMPLES = 2**62
"""Longest run, in samples: sample counters are int64, and the last batch may pass the end."""


def key_faults(job: Job, ranks: int, num_samples: int) -> list[Fault]:
    """Return the faults of single keys, and of keys that contradict each other."""
    return _early_faults(job, ranks, num_samples) + _contradictions(job) + _cut_groups(job, num_samples)


def _early_faults(job: Job, ranks: int, num_samples: int) -> list[Fault]:
    faults = [] if ranks >= 1 else [Fault("ranks", f"must be at least 1, got {ranks}")]
    section = job.schedule
    if isinstance(section, BoundaryBase):
        epochs = (0.0, *section.boundaries_epochs, section.epochs)
        near = [b for b in sorted(set(section.boundaries_epochs)) if b < section.epochs]
        faults += [
            Fault(
                "schedule.boundaries_epochs",
                f"must rise and end before epochs = {epochs[-1]:g}: {b:g} follows {a:g}; nearest: {near}",
            )
            for a, b in itertools.pairwise(epochs)
            if b <= a
        ]
    if not samples_at(section.epochs, num_samples):
        fault = f"{section.epochs:g} of N = {num_samples} samples is less than one sample"
        faults.append(Fault("schedule.epochs", fault))
    if section.warmup_epochs >= section.epochs:
        faults.append(
            Fault("schedule.warmup_epochs", f"{section.warmup_epochs:g} must be below epochs = {section.epochs:g}")
        )
    if job.layout.exact and job.update.precision == "float16":
        fault = "'float16' needs a loss scale, which layout.exact does not support; use 'bfloat16' or 'float32'"
        faults.append(Fault("update.precision", fault))
    if job.layout.exact and job.update.allreduce_dtype != "none":
        fault = f"{job.update.allreduce_dtype!r} rounds the sums that layout.exact keeps exact; choose one"
        faults.append(Fault("update.allreduce_dtype", fault))
    if job.layout.exact and (job.layout.threads_per_rank or 1) > 1:
        fault = f"{job.layout.threads_per_rank} threads sum in another order than 1, which layout.exact needs; "
        faults.append(Fault("layout.threads_per_rank", f"{fault}set 1, or remove the key"))
    if section.raise_momentum_to is not None and section.raise_momentum_to < job.optim.momentum:
        fault = f"{section.raise_momentum_to:g} is below {job.optim.momentum_key} = {job.optim.momentum:g}"
        faults.append(Fault("schedule.raise_momentum_to", f"{fault}; remove it, or lower {job.optim.momentum_key}"))
    return faults + _useless_values(job)


def _useless_values(job: Job) -> list[Fault]:
    """Return faults for values that make training impossible, with the value that was probably meant."""
    optim, update, faults = job.optim, job.update, []
    lr = optim.lr * job.schedule.lr_scale
    if optim.name in {"sgd", "adamw"} and optim.weight_decay >= 1 and lr * optim.weight_decay >= 1:
        product = f"{optim.weight_decay:g} × the learning rate {lr:g} = {lr * optim.weight_decay:g}"
        fault = f"{product}: each update would remove this fraction of every weight; use < {1 / lr:g}"
        faults.append(Fault("optim.weight_decay", fault))
    if update.ema_samples is not None and update.ema_samples < 1:
        decay, batch = update.ema_samples, first_batch(job)
        memory = -batch / math.log(decay)
        fault = f"{decay:g} is below 1, and the time constant counts samples"
        remedy = f"for a decay of {decay:g} per update of {batch} samples use {memory:.6g}"
        faults.append(Fault("update.ema_samples", f"{fault}; {remedy}"))
    trigger = job.trigger
    if isinstance(trigger, PlateauTrigger) and trigger.metric == "top1" and trigger.min_delta >= 1:
        fault = f"{trigger.min_delta:g}: accuracy is in [0, 1], so no evaluation could be an improvement"
        hint = f"for {trigger.min_delta:g} % use {trigger.min_delta / 100:g}; if intended, 0.999"
        faults.append(Fault("trigger.min_delta", f"{fault}; {hint}"))
    return faults


def _contradictions(job: Job) -> list[Fault]:
    """Return faults for keys that the policy or the learning-rate rule contradicts."""
    section, faults = job.schedule, []
    if section.policy == "steps":
        given = {"lr_scale": section.lr_scale != 1, "raise_momentum_to": section.raise_momentum_to is not None}
        own = {"lr_scale": "optim.lr", "raise_momentum_to": job.optim.momentum_key}
        fault = "starts with a larger batch, but batch_steps sets every batch"
        faults += [Fault(f"schedule.{key}", f"{fault}; change {own[key]}") for key in given if given[key]]
    if section.policy == "seesaw" and not isinstance(job.optim, AdamSection):
        fault = f"'seesaw' is for optim.name = 'adam' or 'adamw', not {job.optim.name!r}; use 'grow'"
        faults.append(Fault("schedule.policy", fault))
    if section.policy == "seesaw" and section.exact_noise:
        fault = "is for plain gradients, but 'seesaw' uses the noise of Adam, ε/√B; remove it"
        faults.append(Fault("schedule.exact_noise", fault))
    if getattr(section, "lr_rule", "none") == "adam" and getattr(section, "momenta", None) is not None:
        fault = "set β₁ of each phase, and so does 1 - κ (1-β₁) of lr_rule = 'adam'; choose one"
        faults.append(Fault("schedule.momenta", fault))
    return faults + _unused(job)


def _unused(job: Job) -> list[Fault]:
    """Return faults for keys that are set but not used."""
    section, layout, faults = job.schedule, job.layout, []
    for key in layout.unused():
        users = " or ".join(repr(growth) for growth, keys in KEYS_OF_GROW_BY.items() if key in keys)
        is_of_phases = key == "max_ranks" and layout.grow_by == "ranks"
        why = " without ranks_per_phase" if is_of_phases else f", not {layout.grow_by!r}"
        fault = f"is for grow_by = {users}{why}; remove it"
        faults.append(Fault(f"layout.{key}", fault))
    if section.warmup_start_lr and not section.warmup_epochs:
        fault = f"{section.warmup_start_lr:g} has no effect: warmup_epochs is 0; set it, or remove this key"
        faults.append(Fault("schedule.warmup_start_lr", fault))
    if isinstance(section, HybridSchedule) and section.growing_boundaries > max(1, len(section.boundaries_epochs)):
        count = len(section.boundaries_epochs)
        fault = f"{section.growing_boundaries} of {count} boundaries; nearest: {count}, which is policy = 'grow'"
        faults.append(Fault("schedule.growing_boundaries", fault))
    return faults + (_unused_of_import(section) if isinstance(section, ImportSchedule) else [])


def _unused_of_import(section: ImportSchedule) -> list[Fault]:
    kinds = ["polynomial", "cosine"]
    users = {"power": kinds[:1], "end_lr_fraction": kinds}
    if section.lr_schedule == "steps":
        users["num_phases"] = [*kinds, "module:function"]
    return [
        Fault(f"schedule.{key}", f"is for {' or '.join(map(repr, of))}, not {section.lr_schedule!r}; remove it")
        for key, of in users.items()
        if section.lr_schedule not in of and getattr(section, key) != ImportSchedule.model_fields[key].default
    ]


def _cut_groups(job: Job, num_samples: int) -> list[Fault]:
    """Return faults for batches and a micro-batch limit that would cut ghost batches."""
    group, stated = job.model.ghost_batch, [("layout.max_micro_batch", job.micro_batch_limit)]
    if not isinstance(job.schedule, AdaptiveSchedule):
        stated += _stated_batches(job, num_samples)
    return [Fault(key, cut_groups(samples, group)) for key, samples in stated if samples % group]


def batch_faults(job: Job, num_samples: int) -> list[Fault]:
    """Return the faults of the run's length and of the stated batches. With these, other faults cannot be checked."""
    section, faults = job.schedule, []
    if not section.epochs * num_samples < _MOST_SAMPLES:
        most = f"{_MOST_SAMPLES / num_samples:g}"
        fault = f"{section.epochs:g} of N = {num_samples} samples are more than a sample counter can hold"
        faults.append(Fault("schedule.epochs", f"{fault}; nearest: {most}"))
    for key, batch in _stated_batches(job, num_samples):
        unit = job.model.ghost_batch
        if batch < 1:
            faults.append(Fault(key, f"a batch must be at least 1, got {batch}; nearest: {unit}"))
        if batch >= num_samples:
            below = (num_samples - 1) // unit * unit
            nearest = f"; nearest: {below}" if below else ""
            fault = f"{batch} must be below N = {num_samples}: the whole training set has no sampling noise{nearest}"
            faults.append(Fault(key, fault))
    first, given = first_batch(job), getattr(section, "max_batch", None)
    cap = batch_cap(given, num_samples, batch_unit(job))
    if cap is not None and cap < first:
        shown = f"{given} = {cap}" if isinstance(given, str) else f"{cap}"
        fault = f"{shown} samples of N = {num_samples} is below the first batch {first}; use >= {first}"
        faults.append(Fault("schedule.max_batch", fault))
    return faults


def _stated_batches(job: Job, num_samples: int) -> dict[tuple[str, int], None]:
    """Return the key and samples of each batch that the job file states."""
    section = job.schedule
    if isinstance(section, StepsSchedule):
        return dict.fromkeys(("schedule.batch_steps", batch) for _, batch in parse_batch_steps(section.batch_steps))
    cap = batch_cap(section.max_batch, num_samples, batch_unit(job)) if not isinstance(section, DecaySchedule) else None
    limits = [("schedule.max_batch", cap)] if cap else []  # 0 is reported as below the first batch
    return dict.fromkeys([("schedule.global_batch", section.global_batch), *limits])
