"""`name = "adascale"`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.types import PositiveFloat
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.rounding import half_up
from hvd_batchgrow.schedule.stages import Start
from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement, RuleState, Trigger, TriggerRule


class AdaScaleState(RuleState):
    """The current gain."""

    gain: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 1.0


@TRIGGERS.add
class AdaScaleTrigger(Trigger):
    """Scale the learning rate and the progress of the schedule by the gain of a larger, constant batch."""

    name: Literal["adascale"]
    every_epochs: PositiveFloat = 0.05
    """Epochs between two calculations of the gain."""
    min_change: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Smallest relative change of the gain that is applied."""

    measures_gradients: ClassVar[bool] = True
    scales_progress: ClassVar[bool] = True
    state_model: ClassVar[type[RuleState]] = AdaScaleState
    keeps_state: ClassVar[bool] = True  # the gain of the learning rate

    def make(self, job: Job, num_samples: int) -> AdaScale:
        return AdaScale(self, job.schedule.first_batch)

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        """Return faults unless the gain alone scales the learning rate."""
        section = job.schedule
        others: dict[str, tuple[object, object]] = {
            "lr_scale": (section.lr_scale, 1.0),
            "raise_momentum_to": (section.raise_momentum_to, None),
            "lr_rule": (section.rule, "none"),
        }
        why = "is not for 'adascale', whose gain scales lr; remove it and use batch_scale"
        return [
            Fault(f"schedule.{key}", f"{value!r} {why}") for key, (value, default) in others.items() if value != default
        ]

    def batch_faults(self, job: Job, start: Start) -> list[Fault]:
        """Return a fault unless the batch is larger than B₀ and can be formed."""
        section, unit, cap = job.schedule, start.batch_unit, start.max_batch
        base, scale = section.first_batch, section.enlarged_batch / section.first_batch
        formed, fault = half_up(section.enlarged_batch / unit) * unit, ""
        if formed <= base:
            fault = f"is formed as {formed}: the gain would always be 1; nearest: {(base + unit) / base:g}"
        elif cap is not None and cap < formed:
            limit = f"schedule.max_batch = {section.stated_limit}, {cap} samples"
            fault = f"= {formed} is above {limit}; nearest: {cap / base:g}"
        return [Fault("schedule.batch_scale", f"{scale:g} × {base} {fault}")] if fault else []

    def waits(self) -> dict[str, float]:
        return {"every_epochs": self.every_epochs}


class AdaScale(TriggerRule):
    """The gain of a batch κ times the base batch: r = κ (φ + B₀)/(φ + κ B₀), φ = B_simple.

    It lies between 1, for a gradient without noise, and κ, for pure noise. It is 1 until B_simple is resolved.

    Source: Johnson et al. 2020 (arXiv 2007.05105), §3.

    Args:
        section: the job's section.
        base_batch: B₀, samples.
    """

    state: AdaScaleState

    def __init__(self, section: AdaScaleTrigger, base_batch: int) -> None:
        self._section, self._base_batch, self.state = section, base_batch, AdaScaleState()

    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request for a new gain if the gain has changed enough."""
        if now.b_simple is None:
            return None
        gain = adascale_gain(now.b_simple, self._base_batch, now.global_batch)
        if abs(gain / self.state.gain - 1) < self._section.min_change:
            return None
        kappa = now.global_batch / self._base_batch
        return BatchRequest(
            f"gain {self.state.gain:.3g} → {gain:.3g} of κ = {kappa:g}, B_simple = {now.b_simple:.0f}", gain=gain
        )

    def decided(self, decision: Decision) -> None:
        """Adopt the decided gain."""
        self.state.gain *= decision.new_lr / decision.old_lr


def adascale_gain(b_simple: float, base_batch: int, global_batch: int) -> float:
    """Return r; see `AdaScale`. All arguments are in samples."""
    return global_batch / base_batch * (b_simple + base_batch) / (b_simple + global_batch)
