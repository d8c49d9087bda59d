"""Faults of a job's keys that can be found before its stages are compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.layout import KEYS_OF_GROW_BY
from hvd_batchgrow.config.split import may_have_validation, num_validation
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.layout import cut_ghost_batches
from hvd_batchgrow.schedule.policy import policy_of
from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.trigger import trigger_of
from hvd_batchgrow.schedule.validation.metric_checks import metric_faults

_MOST_SAMPLES = 2**62
"""Longest run, in samples: sample counters are int64, and the last batch may pass the end."""


def key_faults(job: Job, num_samples: int) -> list[Fault]:
    """Return the faults of single keys, and of keys that contradict each other."""
    return [
        *_of_schedule(job, num_samples),
        *_of_exact_mode(job),
        *_useless_values(job),
        *policy_of(job).faults(job, num_samples),
        *_unused(job),
        *_of_trigger(job, num_samples),
        *_of_metrics(job),
        *_of_mixing(job),
        *_cut_ghost_batches(job, num_samples),
    ]


def impossible_faults(job: Job, num_samples: int) -> list[Fault]:
    """Return the faults of the run's length and of the stated batches. With these, no stage can be compiled."""
    section, faults, unit = job.schedule, [], job.model.ghost_batch
    if not section.epochs * num_samples < _MOST_SAMPLES:
        most = f"{_MOST_SAMPLES / num_samples:g}"
        fault = f"{section.epochs:g} of N = {num_samples} samples are more than a sample counter can hold"
        faults.append(Fault("schedule.epochs", f"{fault}; nearest: {most}"))
    for key, batch in _stated_batches(job, num_samples):
        if batch < 1:
            faults.append(Fault(key, f"a batch must be at least 1, got {batch}; nearest: {unit}"))
        if batch >= num_samples:
            below = (num_samples - 1) // unit * unit
            nearest = f"; nearest: {below}" if below else ""
            why = "the whole training set has no sampling noise"
            fault = f"{batch} must be below N = {_arithmetic(job, num_samples)}: {why}{nearest}"
            faults.append(Fault(key, fault))
    cap = _limit(job, num_samples)
    if cap is not None and cap < section.first_batch:
        faults.append(Fault("schedule.max_batch", _low_limit(job, num_samples, cap)))
    return faults


def _low_limit(job: Job, num_samples: int, cap: int) -> str:
    """Return the fault of a limit below the first batch, with the arithmetic of a limit such as "N/10"."""
    section, ghost_batch = job.schedule, job.model.ghost_batch
    first, given, unit = section.first_batch, section.stated_limit, section.batch_unit(ghost_batch)
    most = cap
    text = f"{cap} samples of N = {num_samples} is"
    if isinstance(given, str):
        share, step = num_samples // int(given.removeprefix("N/")), section.stated_unit or ghost_batch
        most = share // step * step  # without batch_multiple, the unit may be the first batch itself
        default = "model.ghost_batch" if unit == ghost_batch else "global_batch"
        key = "batch_multiple" if section.stated_unit else default
        rounded = f", rounded down to a multiple of {key} = {unit}, is {cap}:" if share != cap else " is"
        text = f"{given} = {share} of N = {num_samples} samples{rounded}"
    ways = [f"max_batch >= {first}"] if first < num_samples else []
    ways += [f"global_batch <= {most}"] if most else []
    return f"{text} below the first batch {first}" + (f"; use {', or '.join(ways)}" if ways else "")


def _arithmetic(job: Job, num_samples: int) -> str:
    """Return N, with the number of samples that are held out for validation."""
    held_out = num_validation(job.data)
    return f"{num_samples}" + (f" = {num_samples + held_out} - {held_out} for validation" if held_out else "")


def _of_schedule(job: Job, num_samples: int) -> Iterator[Fault]:
    section, optim = job.schedule, job.optim
    if not samples_at(section.epochs, num_samples):
        fault = f"{section.epochs:g} of N = {num_samples} samples is less than one sample"
        yield Fault("schedule.epochs", fault)
    if section.warmup_epochs >= section.epochs:
        fault = f"{section.warmup_epochs:g} must be below epochs = {section.epochs:g}"
        yield Fault("schedule.warmup_epochs", fault)
    if section.warmup_start_lr and not section.warmup_epochs:
        fault = f"{section.warmup_start_lr:g} has no effect: warmup_epochs is 0; set it, or remove this key"
        yield Fault("schedule.warmup_start_lr", fault)
    if section.raise_momentum_to is None:
        return
    if optim.averages_gradients:
        fault = (
            f"is for sgd and lars: the step of {optim.name} is an average of gradients, whose noise β₁ does not change"
        )
        remedy = f"so the batch would stay; remove it, and set β₁ as {optim.momentum_key}"
        yield Fault("schedule.raise_momentum_to", f"{fault}, {remedy}")
    elif section.raise_momentum_to < optim.momentum:
        fault = f"{section.raise_momentum_to:g} is below {optim.momentum_key} = {optim.momentum:g}"
        yield Fault("schedule.raise_momentum_to", f"{fault}; remove it, or lower {optim.momentum_key}")


def _of_exact_mode(job: Job) -> Iterator[Fault]:
    if not job.layout.exact:
        return
    if job.update.precision == "float16":
        fault = "'float16' needs a loss scale, which layout.exact does not support; use 'bfloat16' or 'float32'"
        yield Fault("update.precision", fault)
    if job.update.precision == "tf32":
        fault = "'tf32' rounds products, which layout.exact does not allow; use 'float32' or 'bfloat16'"
        yield Fault("update.precision", fault)
    if job.update.allreduce_dtype != "none":
        fault = f"{job.update.allreduce_dtype!r} rounds the sums that layout.exact keeps exact; choose one"
        yield Fault("update.allreduce_dtype", fault)


def _useless_values(job: Job) -> Iterator[Fault]:
    """Yield faults for values that make training impossible, with the value that was probably meant."""
    optim, update = job.optim, job.update
    lr = optim.lr * job.schedule.lr_scale
    if optim.name in {"sgd", "adamw"} and optim.weight_decay >= 1 and lr * optim.weight_decay >= 1:
        product = f"{optim.weight_decay:g} × the learning rate {lr:g} = {lr * optim.weight_decay:g}"
        fault = f"{product}: each update would remove this fraction of every weight"
        remedy = f"use < {1 / lr:g}, or a learning rate < {1 / optim.weight_decay:g}"
        yield Fault("optim.weight_decay", f"{fault}; {remedy}")
    raised = job.schedule.raise_momentum_to or 0.0, *(getattr(job.schedule, "momenta", None) or ())
    if getattr(optim, "nesterov", False) and not max(optim.momentum, *raised):
        yield Fault("optim.momentum", "0, and optim.nesterov = true needs momentum; use 0.9, or remove optim.nesterov")
    if update.ema_samples is not None and update.ema_samples < 1:
        decay, batch = update.ema_samples, job.schedule.first_batch
        memory = -batch / math.log(decay)
        fault = f"{decay:g} is below 1, and the time constant counts samples"
        remedy = f"for a decay of {decay:g} per update of {batch} samples use {memory:.6g}"
        yield Fault("update.ema_samples", f"{fault}; {remedy}")


def _unused(job: Job) -> Iterator[Fault]:
    """Yield faults for keys that are set but not used, or lack what they use."""
    layout, noise = job.layout, job.gradient_noise
    for key in layout.unused():
        users = " or ".join(repr(growth) for growth, keys in KEYS_OF_GROW_BY.items() if key in keys)
        is_of_phases = key == "max_ranks" and layout.grow_by == "ranks"
        why = " without ranks_per_phase" if is_of_phases else f", not {layout.grow_by!r}"
        yield Fault(f"layout.{key}", f"is for grow_by = {users}{why}; remove it")
    if noise.preconditioned and job.optim.name not in {"adam", "adamw"}:
        fault = f"is for optim.name = 'adam' or 'adamw', not {job.optim.name!r}"
        yield Fault("gradient_noise.preconditioned", fault)
    yield from _unused_of_noise(job)
    if (metric := job.checkpoint.keep_best) and not may_have_validation(job.data):
        fault = f"{metric!r} needs a validation set; on the test set, the best result would no longer be a test"
        yield Fault("checkpoint.keep_best", f"{fault}: set data.validation_fraction, such as 0.1")


def _unused_of_noise(job: Job) -> Iterator[Fault]:
    """Yield faults for keys of `[gradient_noise]` that nothing uses."""
    noise, uses_layers = job.gradient_noise, job.gradient_noise.estimator == "norm_layers"
    is_measured = noise.measure or job.trigger.measures_gradients
    keys = ("estimator", "preconditioned", "per_layer_group")
    for key in keys if not is_measured else ():
        if getattr(noise, key) != type(noise).model_fields[key].default:
            fault = "has no effect if nothing is measured: set gradient_noise.measure = true too"
            yield Fault(f"gradient_noise.{key}", fault)
    for key in ("preconditioned", "per_layer_group"):
        if getattr(noise, key) and uses_layers:
            yield Fault(f"gradient_noise.{key}", "is for estimator = 'micro_batches', not 'norm_layers'; remove it")
    if noise.norm_layers_factor != 1 and not uses_layers:
        fault = "is for estimator = 'norm_layers', not 'micro_batches'; remove it"
        yield Fault("gradient_noise.norm_layers_factor", fault)


def _of_trigger(job: Job, num_samples: int) -> list[Fault]:
    trigger, policy = trigger_of(job), job.schedule.policy
    if job.is_adaptive:
        return trigger.faults(job, num_samples)
    fault = f"{trigger.name!r} has no effect with policy = {policy!r}; use 'adaptive'"
    return [Fault("trigger.name", fault)] if trigger.decides else []


def _of_metrics(job: Job) -> Iterator[Fault]:
    """Yield the faults of metrics that can be found without loading a custom task."""
    if directions := job.task.directions():
        yield from metric_faults(job, directions)
    elif job.is_adaptive and job.trigger.test_metric not in {None, "loss"} and not getattr(job.trigger, "mode", None):
        fault = f"is needed for a metric of a custom task: does {job.trigger.test_metric} improve when it rises"
        yield Fault("trigger.mode", f"{fault} ('max') or when it falls ('min')?")


def _of_mixing(job: Job) -> Iterator[Fault]:
    """Yield the faults of Mixup and CutMix, which mix the samples of a ghost batch and their classes."""
    ghost_batch, target = job.model.ghost_batch, job.task.target
    for key in ("mixup_alpha", "cutmix_alpha"):
        if getattr(job.data, key) and ghost_batch < 2:
            fault = f"mixes the samples of a ghost batch, and model.ghost_batch = {ghost_batch}"
            yield Fault(f"data.{key}", f"{fault}; use >= 2, or set it to 0")
        elif getattr(job.data, key) and target not in {"class", None}:
            yield Fault(f"data.{key}", f"mixes classes; set it to 0 with task.name = {job.task.name!r}")


def _cut_ghost_batches(job: Job, num_samples: int) -> list[Fault]:
    """Return faults for batches and a micro-batch limit that would cut ghost batches."""
    ghost_batch, stated = job.model.ghost_batch, [("layout.max_micro_batch", job.micro_batch_limit)]
    # `unit_faults` checks multiples of other units.
    if not job.is_adaptive and job.schedule.batch_unit(ghost_batch) == ghost_batch:
        stated += _stated_batches(job, num_samples)
    return [Fault(key, cut_ghost_batches(samples, ghost_batch)) for key, samples in stated if samples % ghost_batch]


def _stated_batches(job: Job, num_samples: int) -> dict[tuple[str, int], None]:
    """Return the key and samples of each batch that the job file states."""
    return dict.fromkeys(policy_of(job).stated_batches(_limit(job, num_samples)))


def _limit(job: Job, num_samples: int) -> int | None:
    return job.schedule.limit(num_samples, job.schedule.batch_unit(job.model.ghost_batch))
