"""`policy = "adaptive"`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import GrowthKeys, LrRuleKeys, MaxBatch
from hvd_batchgrow.config.types import FloatList
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.batch_unit import unit_faults
from hvd_batchgrow.schedule.lr_rule import apply_lr_rule
from hvd_batchgrow.schedule.policies.boundaries import boundary_faults
from hvd_batchgrow.schedule.policy import POLICIES, BatchPolicy
from hvd_batchgrow.schedule.rounding import decimal
from hvd_batchgrow.schedule.stages import Stage, Start
from hvd_batchgrow.schedule.trigger import TRIGGERS, trigger_of
from hvd_batchgrow.schedule.weight_decay import apply_weight_decay_rule


@POLICIES.add
class AdaptiveSchedule(GrowthKeys, LrRuleKeys, BatchPolicy):
    """Grow the batch when `[trigger]` decides to.

    With AdaScale an update at a gain r makes as much progress as r updates of the base batch: r B₀ samples. Boundaries
    of the learning rate and the end are positions in that progress (Johnson et al. 2020, arXiv 2007.05105, alg. 1).
    With any other trigger, progress is the number of samples seen.
    """

    policy: Literal["adaptive"]
    max_batch: MaxBatch = "N/10"
    """Largest batch: samples, or a fraction of N."""
    batch_scale: Annotated[float, Field(ge=1)] = 1.0
    """For AdaScale: the batch as a multiple of `global_batch`, for which learning rate and epochs are chosen."""
    lr_boundaries_epochs: FloatList = ()
    """Epochs at which the learning rate is divided by `lr_factor`, in addition to what the trigger decides."""
    lr_factor: Annotated[float, Field(gt=1)] = 10.0
    """Divisor of the learning rate at `lr_boundaries_epochs`."""

    is_adaptive: ClassVar[bool] = True

    @property
    def enlarged_batch(self) -> float:
        return self.batch_scale * self.global_batch

    def batch_unit(self, ghost_batch: int) -> int:
        return self.stated_unit or self.global_batch

    def course(self, job: Job, start: Start, decisions: Sequence[Decision]) -> tuple[list[Stage], float]:
        """Return the stages and the epoch at which the run ends.

        Raises:
            JobError: the decisions do not belong to this job: they are not at update boundaries of this job, or were
                made at another batch or learning rate.
        """
        num_samples, segments = start.noise.num_samples, _segments(job, start, decisions)
        boundaries = [decimal(epoch) * num_samples for epoch in self.lr_boundaries_epochs]
        stages: list[Stage] = []

        def add(segment: _Segment, samples: float | Fraction, num_passed: int) -> None:
            lr = segment.lr / self.lr_factor**num_passed
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
        if not job.trigger.scales_progress:
            return stages, self.epochs
        return stages, (last.samples + (self.epochs * num_samples - last.progress) / last.rate) / num_samples

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        trigger, faults = trigger_of(job), []
        if not trigger.decides:
            deciding = [variant.name for variant in TRIGGERS.specs() if variant.section.decides]
            fault = f"schedule.policy = 'adaptive' needs a trigger: {', '.join(deciding)}"
            return [Fault("trigger.name", fault)]
        if job.layout.grow_by == "auto" or job.layout.ranks_per_phase:
            key = "layout.grow_by" if job.layout.grow_by == "auto" else "layout.ranks_per_phase"
            fault = "needs to know the phases in advance; with a trigger use grow_by = 'accumulation' or 'ranks'"
            faults.append(Fault(key, fault))
        if self.batch_scale != 1 and not trigger.scales_progress:
            fault = f"{self.batch_scale:g} is for trigger.name = 'adascale'; with other triggers use schedule.lr_scale"
            faults.append(Fault("schedule.batch_scale", fault))
        faults += boundary_faults("lr_boundaries_epochs", self.lr_boundaries_epochs, self.epochs)
        return faults + self._span_faults(job)

    def batch_faults(self, job: Job, start: Start, ranks: int) -> list[Fault]:
        return [*unit_faults(job, start, ranks), *_rule_faults(job, start)]

    def stated_decay(self, job: Job) -> tuple[tuple[float, ...], float | tuple[float, ...]] | None:
        """Return the schedule that AdaScale scales."""
        return (self.lr_boundaries_epochs, self.lr_factor) if job.trigger.scales_progress else None

    def _span_faults(self, job: Job) -> list[Fault]:
        """Return faults if the time before the first decision is as long as the run."""
        most = self.epochs * self.batch_scale  # the longest run: with AdaScale at a gain of 1
        waits = trigger_of(job).waits()
        if min((job.evaluation.every_epochs, *self.lr_boundaries_epochs)) < most:  # a trigger also measures there
            waits.pop("every_epochs", None)
        return [
            Fault(f"trigger.{key}", f"{span:g} is not below the run's {most:g} epochs: it would never decide; use less")
            for key, span in waits.items()
            if span >= most
        ]


def _rule_faults(job: Job, start: Start) -> list[Fault]:
    """Return the faults of the rules of learning rate and weight decay at the largest possible batch."""
    first = start.first_stage
    largest = replace(first, global_batch=start.max_batch or start.noise.num_samples)
    try:
        apply_weight_decay_rule(apply_lr_rule([first, largest], job), job)
    except JobError as error:
        return list(error.faults)
    return []


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


def _segments(job: Job, start: Start, decisions: Sequence[Decision]) -> list[_Segment]:
    base = job.schedule.first_batch if job.trigger.scales_progress else None

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
