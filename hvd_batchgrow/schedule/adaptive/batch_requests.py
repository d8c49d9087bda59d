"""Growth by decisions: what a wish becomes once it is rounded, and the stages that decisions lead to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import AdaptiveSchedule
from hvd_batchgrow.config.triggers import AdaScaleTrigger
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.policies import Stage, Start, make_start
from hvd_batchgrow.schedule.rounding import decimal


@dataclass(frozen=True)
class BatchRequest:
    """What a trigger asks for: one of these."""

    why: str
    batch: float | None = None
    """B, samples, at the same learning rate."""
    most: float | None = None
    """Beyond which no rounding may take B; None: what `schedule.max_batch` allows."""
    noise_factor: float | None = None
    """By which g is to fall: by the batch as far as it goes, then by the learning rate."""
    gain: float | None = None
    """AdaScale's r: the learning rate as a multiple of what the job gives for its base batch; the batch stays."""


def form_decision(
    job: Job,
    num_samples: int,
    decisions: Sequence[Decision],
    samples: int,
    wish: BatchRequest,
    measured: Mapping[str, float],
) -> Decision | None:
    """Round a wish to what can be formed; None: to what there is.

    A batch is a whole number of `schedule.batch_multiple` and at most `schedule.max_batch`. As in
    every policy, the learning rate corrects for the rounding, so that the noise scale is the requested
    one. If the noise scale is to fall, it also corrects for the limit. Under an `lr_rule` it corrects
    for neither, because κ of the rule is that of the formed batch. It still falls if the noise scale
    is to fall and the batch cannot grow.

    Args:
        job: of a measured schedule.
        num_samples: N.
        decisions: those so far.
        samples: sample counter.
        wish: of the trigger.
        measured: what led to it.
    """
    start = make_start(job, num_samples)
    batch, lr = (decisions[-1].new_batch, decisions[-1].new_lr) if decisions else (start.global_batch, start.lr)
    has_rule = job.schedule.lr_rule != "none"  # type: ignore[union-attr]
    formed, wanted = _formed(start, batch, lr, wish, has_rule=has_rule)
    moves_lr_alone = formed.global_batch == batch
    # Where a batch was asked for, the learning rate alone would follow nothing but the error of the measurement.
    if moves_lr_alone and (wish.batch is not None or math.isclose(formed.lr, lr, rel_tol=1e-3)):
        return None
    return Decision(
        samples=samples,
        trigger=job.trigger.name,
        why=wish.why,
        old_batch=batch,
        new_batch=formed.global_batch,
        wanted_batch=wanted,
        old_lr=lr,
        new_lr=formed.lr,
        measured=dict(measured),
    )


def _formed(start: Start, batch: int, lr: float, wish: BatchRequest, *, has_rule: bool) -> tuple[Stage, float]:
    """The stage that comes closest, and the batch that was wanted."""
    noise, momentum = start.noise, start.momentum
    if wish.gain is not None:
        return Stage(0.0, start.lr * wish.gain, momentum, batch, float(batch)), float(batch)
    if wish.noise_factor is not None:
        target = noise.of(lr, momentum, batch) / wish.noise_factor
        wanted = noise.batch_for(target, momentum, start.lr)
        formed = start.stage(0.0, target, momentum, wanted)
        lr_before_rule = lr if formed.global_batch > batch else lr / wish.noise_factor
        return (replace(formed, lr=lr_before_rule) if has_rule else formed), wanted
    assert wish.batch is not None
    limited = min(wish.batch, start.max_batch or start.noise.num_samples / 2)
    if wish.most is not None:
        most = start.whole(wish.most)
        start = replace(start, max_batch=min(most, start.max_batch or most))
    formed = start.stage(0.0, noise.of(start.lr, momentum, limited), momentum, limited)
    return (replace(formed, lr=lr) if has_rule else formed), wish.batch


@dataclass(frozen=True)
class _Segment:
    """What holds from one decision to the next."""

    samples: int
    progress: float
    """Of the schedule of the learning rate, in samples: under AdaScale not the samples seen."""
    rate: float
    """Progress per sample."""
    batch: int
    wanted_batch: float
    lr: float


def measured_stages(job: Job, start: Start, decisions: Sequence[Decision]) -> tuple[list[Stage], float]:
    """The stages of a measured schedule, and the epoch at which it ends.

    Under AdaScale an update makes as much progress as r updates of the base batch, r its gain:
    r B₀ samples of it. Boundaries of the learning rate and the end are places in that progress
    (Johnson et al. 2020, arXiv 2007.05105, alg. 1). Under any other trigger progress is samples.

    Args:
        job: of a measured schedule.
        start: of `make_start`.
        decisions: those made.

    Raises:
        JobError: the decisions do not belong to this job: they do not follow one another at whole updates, or
            were made at another batch or learning rate.
    """
    section = job.schedule
    assert isinstance(section, AdaptiveSchedule)
    num_samples, stretches = start.noise.num_samples, _stretches(job, start, decisions)
    boundaries = [decimal(epoch) * num_samples for epoch in section.lr_boundaries_epochs]
    stages: list[Stage] = []

    def add(stretch: _Segment, samples: float | Fraction, num_passed: int) -> None:
        lr = stretch.lr / section.lr_factor**num_passed
        epoch, wanted = float(samples / num_samples), stretch.wanted_batch
        stages.append(Stage(epoch, lr, start.momentum, stretch.batch, wanted, progress_rate=stretch.rate))

    for stretch, end in zip(stretches, [*(later.progress for later in stretches[1:]), math.inf], strict=True):
        passed = sum(boundary <= stretch.progress for boundary in boundaries)
        add(stretch, stretch.samples, passed)
        for k, boundary in enumerate(boundaries[passed:], start=passed + 1):
            if boundary < end:
                ahead = boundary - Fraction(stretch.progress)
                add(stretch, stretch.samples + (ahead if stretch.rate == 1 else float(ahead) / stretch.rate), k)
    last = stretches[-1]
    if last.rate == 1:
        return stages, section.epochs
    return stages, (last.samples + (section.epochs * num_samples - last.progress) / last.rate) / num_samples


def _stretches(job: Job, start: Start, decisions: Sequence[Decision]) -> list[_Segment]:
    base = job.schedule.global_batch if isinstance(job.trigger, AdaScaleTrigger) else None  # type: ignore[union-attr]

    def rate(batch: int, lr: float) -> float:
        return 1.0 if base is None else lr / start.lr * base / batch

    first = start.global_batch
    stretches = [_Segment(0, 0.0, rate(first, start.lr), first, float(first), start.lr)]
    faults: list[Fault] = []
    for k, decision in enumerate(decisions, start=1):
        last = stretches[-1]
        seen = decision.samples - last.samples
        progress = float(decision.samples) if base is None else last.progress + seen * last.rate
        if seen <= 0 or seen % last.batch:
            fault = f"{seen / last.batch:.2f} updates of {last.batch} after sample {last.samples:,}"
            told = f"at sample {decision.samples:,}, {fault}: this job is never there between two updates"
            faults.append(Fault(f"decision {k}", told))
        elif decision.old_batch != last.batch or not math.isclose(decision.old_lr, last.lr, rel_tol=1e-6):
            was, would = f"{decision.old_batch:,}, lr {decision.old_lr:.4g}", f"{last.batch:,}, lr {last.lr:.4g}"
            told = f"at sample {decision.samples:,}, it was made at a batch of {was}; this job is at {would} there"
            faults.append(Fault(f"decision {k}", told))
        elif progress >= decimal(job.schedule.epochs) * start.noise.num_samples:
            fault = f"at sample {decision.samples:,}, where the {job.schedule.epochs:g} epochs of this job are over"
            faults.append(Fault(f"decision {k}", fault))
        new = decision.new_batch, decision.wanted_batch, decision.new_lr
        stretches.append(_Segment(decision.samples, progress, rate(decision.new_batch, decision.new_lr), *new))
    if faults:
        raise JobError(faults, job.name)
    return stretches
