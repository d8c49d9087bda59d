"""Round a trigger's request to a decision, and compile decisions to stages."""

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
    """What a trigger requests: one of `batch`, `noise_factor` and `gain`."""

    why: str
    batch: float | None = None
    """B in samples, at the same learning rate."""
    most: float | None = None
    """Limit that rounding must not exceed, in samples. None: `schedule.max_batch`."""
    noise_factor: float | None = None
    """Divisor of the noise scale g: the batch grows up to its limit, then the learning rate decays."""
    gain: float | None = None
    """AdaScale's r: the learning rate as a multiple of the job's learning rate; the batch is constant."""


def form_decision(
    job: Job,
    num_samples: int,
    decisions: Sequence[Decision],
    samples: int,
    request: BatchRequest,
    measured: Mapping[str, float],
) -> Decision | None:
    """Return the decision for a request, or None if rounding leaves batch and learning rate unchanged.

    A batch is a whole multiple of `schedule.batch_multiple` and at most `schedule.max_batch`. As in every policy, the
    learning rate corrects for the rounding, so that the noise scale is the requested one. If the noise scale is to
    fall, it also corrects for the limit. With an `lr_rule` it corrects for neither, because κ of the rule follows the
    formed batch. It still falls if the noise scale is to fall and the batch cannot grow.

    Args:
        job: a job with an adaptive schedule.
        num_samples: N.
        decisions: the decisions so far.
        samples: sample counter.
        request: the trigger's request.
        measured: the measurements that led to it.
    """
    start = make_start(job, num_samples)
    batch, lr = (decisions[-1].new_batch, decisions[-1].new_lr) if decisions else (start.global_batch, start.lr)
    has_rule = job.schedule.lr_rule != "none"  # type: ignore[union-attr]
    formed, wanted = _formed(start, batch, lr, request, has_rule=has_rule)
    moves_lr_alone = formed.global_batch == batch
    # If a batch was requested, a change of the learning rate alone would only follow the measurement's error.
    if moves_lr_alone and (request.batch is not None or math.isclose(formed.lr, lr, rel_tol=1e-3)):
        return None
    return Decision(
        samples=samples,
        trigger=job.trigger.name,
        why=request.why,
        old_batch=batch,
        new_batch=formed.global_batch,
        wanted_batch=wanted,
        old_lr=lr,
        new_lr=formed.lr,
        measured=dict(measured),
    )


def _formed(start: Start, batch: int, lr: float, request: BatchRequest, *, has_rule: bool) -> tuple[Stage, float]:
    """Return the nearest stage that can be formed, and the requested batch."""
    noise, momentum = start.noise, start.momentum
    if request.gain is not None:
        return Stage(0.0, start.lr * request.gain, momentum, batch, float(batch)), float(batch)
    if request.noise_factor is not None:
        target = noise.of(lr, momentum, batch) / request.noise_factor
        wanted = noise.batch_for(target, momentum, start.lr)
        formed = start.stage(0.0, target, momentum, wanted)
        lr_before_rule = lr if formed.global_batch > batch else lr / request.noise_factor
        return (replace(formed, lr=lr_before_rule) if has_rule else formed), wanted
    assert request.batch is not None
    limited = min(request.batch, start.max_batch or start.noise.num_samples / 2)
    if request.most is not None:
        most = start.whole(request.most)
        start = replace(start, max_batch=min(most, start.max_batch or most))
    formed = start.stage(0.0, noise.of(start.lr, momentum, limited), momentum, limited)
    return (replace(formed, lr=lr) if has_rule else formed), request.batch


@dataclass(frozen=True)
class _Segment:
    """The updates from one decision to the next."""

    samples: int
    progress: float
    """Progress of the learning-rate schedule, in samples; with AdaScale it differs from the samples seen."""
    rate: float
    """Progress per sample."""
    batch: int
    wanted_batch: float
    lr: float


def adaptive_stages(job: Job, start: Start, decisions: Sequence[Decision]) -> tuple[list[Stage], float]:
    """Return the stages of an adaptive schedule, and the epoch at which it ends.

    With AdaScale an update at a gain r makes as much progress as r updates of the base batch: r B₀ samples. Boundaries
    of the learning rate and the end are positions in that progress (Johnson et al. 2020, arXiv 2007.05105, alg. 1).
    With any other trigger, progress is the number of samples seen.

    Args:
        job: a job with an adaptive schedule.
        start: the result of `make_start`.
        decisions: the decisions so far.

    Raises:
        JobError: the decisions do not belong to this job: they are not at update boundaries of this job, or were made
            at another batch or learning rate.
    """
    section = job.schedule
    assert isinstance(section, AdaptiveSchedule)
    num_samples, segments = start.noise.num_samples, _segments(job, start, decisions)
    boundaries = [decimal(epoch) * num_samples for epoch in section.lr_boundaries_epochs]
    stages: list[Stage] = []

    def add(segment: _Segment, samples: float | Fraction, num_passed: int) -> None:
        lr = segment.lr / section.lr_factor**num_passed
        epoch, wanted = float(samples / num_samples), segment.wanted_batch
        stages.append(Stage(epoch, lr, start.momentum, segment.batch, wanted, progress_rate=segment.rate))

    for segment, end in zip(segments, [*(later.progress for later in segments[1:]), math.inf], strict=True):
        passed = sum(boundary <= segment.progress for boundary in boundaries)
        add(segment, segment.samples, passed)
        for k, boundary in enumerate(boundaries[passed:], start=passed + 1):
            if boundary < end:
                ahead = boundary - Fraction(segment.progress)
                add(segment, segment.samples + (ahead if segment.rate == 1 else float(ahead) / segment.rate), k)
    last = segments[-1]
    if last.rate == 1:
        return stages, section.epochs
    return stages, (last.samples + (section.epochs * num_samples - last.progress) / last.rate) / num_samples


def _segments(job: Job, start: Start, decisions: Sequence[Decision]) -> list[_Segment]:
    base = job.schedule.global_batch if isinstance(job.trigger, AdaScaleTrigger) else None  # type: ignore[union-attr]

    def rate(batch: int, lr: float) -> float:
        return 1.0 if base is None else lr / start.lr * base / batch

    first = start.global_batch
    segments = [_Segment(0, 0.0, rate(first, start.lr), first, float(first), start.lr)]
    faults: list[Fault] = []
    for k, decision in enumerate(decisions, start=1):
        last = segments[-1]
        seen = decision.samples - last.samples
        progress = float(decision.samples) if base is None else last.progress + seen * last.rate
        if seen <= 0 or seen % last.batch:
            fault = f"{seen / last.batch:.2f} updates of {last.batch} after sample {last.samples:,}"
            fault = f"at sample {decision.samples:,}, {fault}: this is not an update boundary of this job"
            faults.append(Fault(f"decision {k}", fault))
        elif decision.old_batch != last.batch or not math.isclose(decision.old_lr, last.lr, rel_tol=1e-6):
            was, would = f"{decision.old_batch:,}, lr {decision.old_lr:.4g}", f"{last.batch:,}, lr {last.lr:.4g}"
            fault = f"at sample {decision.samples:,}, it was made at a batch of {was}; this job is at {would} there"
            faults.append(Fault(f"decision {k}", fault))
        elif progress >= decimal(job.schedule.epochs) * start.noise.num_samples:
            fault = f"at sample {decision.samples:,}, where the {job.schedule.epochs:g} epochs of this job are over"
            faults.append(Fault(f"decision {k}", fault))
        new = decision.new_batch, decision.wanted_batch, decision.new_lr
        segments.append(_Segment(decision.samples, progress, rate(decision.new_batch, decision.new_lr), *new))
    if faults:
        raise JobError(faults, job.name)
    return segments
