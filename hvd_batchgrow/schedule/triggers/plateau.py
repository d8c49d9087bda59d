"""`name = "plateau"`."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.types import matching
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.rounding import decimal, periods_done
from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement, RuleState, TriggerRule, WindowTrigger

_ROUNDING = 1e-9
"""Tolerance, in epochs, for rounding in sums of fractions of epochs."""
_FRACTIONS = {"top1", "f1", "label_accuracy"}
"""Metrics in [0, 1]."""
_COUNTABLE = 1e6
"""Most evaluations that are counted; with more, the patience is compared with the whole run."""


class PlateauState(RuleState):
    """The best result of the evaluations, and epochs."""

    best: float
    best_samples: NonNegativeInt
    """Sample counter of the best evaluation."""
    bad: float
    """Epoch since which no evaluation was an improvement."""
    cool: float
    """Epoch at which the cooldown ends."""
    last: float
    """Epoch of the last evaluation."""


def _without_prefix(metric: object) -> object:
    return metric.removeprefix("val/") if isinstance(metric, str) else metric


@TRIGGERS.add
class PlateauTrigger(WindowTrigger):
    """Divide the noise scale when the test result has stopped improving, like torch's ReduceLROnPlateau."""

    name: Literal["plateau"]
    metric: Annotated[str, BeforeValidator(_without_prefix), matching(r"[a-z]\w*", "loss or a metric")] = "loss"
    """Result of the evaluations during training: "loss", or a metric of the task such as "top1"; "val/top1" is the
    same."""
    mode: Literal["min", "max"] | None = None
    """Whether the metric improves when it falls (min) or rises (max). None: known from the task; a custom task's metric
    needs it."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change of the metric that counts as an improvement; the change must exceed it."""
    patience_epochs: Annotated[float, Field(ge=0)] = 3.0
    """Epochs without improvement before the batch grows; growth needs more than this."""
    cooldown_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs after a decision that do not count towards `patience_epochs`."""
    noise_factor: Annotated[float, Field(gt=1)] = 5.0
    """Divisor of the noise scale at a decision: the batch grows, and at `max_batch` the learning rate decays."""
    restore_best: bool = False
    """At a decision, restore the weights of the best evaluation and their moving average; the optimizer keeps its
    state."""

    lowers_noise: ClassVar[bool] = True
    state_model: ClassVar[type[RuleState]] = PlateauState

    @property
    def test_metric(self) -> str:
        return self.metric

    @property
    def restores_best(self) -> bool:
        return self.restore_best

    @property
    def factor(self) -> float:
        """Divisor of the noise scale."""
        return self.noise_factor

    def forced(self, batch: int, why: str) -> BatchRequest:
        return BatchRequest(why, noise_factor=self.noise_factor)

    def make(self, job: Job, num_samples: int) -> Plateau:
        improves_up = self.mode == "max" if self.mode else (job.task.directions() or {}).get(self.metric) == "up"
        return Plateau(self, num_samples, job.evaluation.every_epochs, improves_up=improves_up)

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        faults = super().faults(job, num_samples)
        if self.metric in _FRACTIONS and self.min_delta >= 1:
            fault = f"{self.min_delta:g}: {self.metric} is in [0, 1], so no evaluation could be an improvement"
            hint = f"for {self.min_delta:g} % use {self.min_delta / 100:g}; if intended, 0.999"
            faults.append(Fault("trigger.min_delta", f"{fault}; {hint}"))
        return faults

    def waits(self) -> dict[str, float]:
        return {} if self.windows_epochs else {"patience_epochs": self.patience_epochs}

    def no_growth(self, job: Job) -> str | None:
        """Return the keys if the time from the first to the last evaluation before the end is at most the patience."""
        every, epochs = job.evaluation.every_epochs, job.schedule.epochs
        if self.windows_epochs or epochs / every > _COUNTABLE:
            return None
        num_before_end = math.ceil(epochs / every - _ROUNDING) - 1
        if (num_before_end - 1) * every > self.patience_epochs + _ROUNDING:
            return None
        return f"evaluation.every_epochs = {every:g} and trigger.patience_epochs = {self.patience_epochs:g}"

    def unlikely_values(self) -> list[str]:
        if self.metric not in _FRACTIONS or self.min_delta < 0.1:
            return []
        share = f"trigger.min_delta = {self.min_delta:g} is {self.min_delta:.0%} of the evaluated set"
        return [f"{share}: {self.metric} is in [0, 1]"]


class Plateau(TriggerRule):
    """The rule of torch's ReduceLROnPlateau with an absolute threshold, in epochs instead of calls.

    An evaluation counts at the epoch at which it was due, although it happens at the first update after it. An
    evaluation whose loss is not finite does not count: the epochs since the previous evaluation extend neither
    patience nor cooldown, as if torch's rule had not been called.

    Args:
        section: the job's section.
        num_samples: N.
        every_epochs: how often a set is evaluated.
        improves_up: whether the metric improves when it rises.
    """

    state: PlateauState

    def __init__(self, section: PlateauTrigger, num_samples: int, every_epochs: float, *, improves_up: bool) -> None:
        self._section = section
        self._num_samples = num_samples
        self._every_epochs = every_epochs
        self._sign = -1 if improves_up else 1
        self.state = PlateauState(best=self._sign * math.inf, best_samples=0, bad=0.0, cool=-math.inf, last=0.0)

    @property
    def best_samples(self) -> int:
        return self.state.best_samples

    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request if an evaluation shows a plateau."""
        if now.metric is None and not now.was_unusable:
            return None
        epoch = self._due_epoch(now.samples)
        since_last, self.state.last = epoch - self.state.last, epoch
        if now.metric is None:
            self.state.bad += since_last
            self.state.cool += since_last
            return None
        if self._sign * now.metric < self._sign * self.state.best - self._section.min_delta:
            self.state.best, self.state.best_samples, self.state.bad = now.metric, now.samples, epoch
        if epoch <= self.state.cool + _ROUNDING:
            self.state.bad = epoch
        bad_epochs = epoch - self.state.bad
        if bad_epochs <= self._section.patience_epochs + _ROUNDING:
            return None
        why = (
            f"{self._section.metric} no better than {self.state.best:.4g} for {bad_epochs:.3g} epochs, "
            f"more than patience {self._section.patience_epochs:g}"
        )
        return BatchRequest(why, noise_factor=self._section.noise_factor)

    def decided(self, decision: Decision) -> None:
        """Reset patience and cooldown after a decision, made now or before the run resumed."""
        self.state.bad = self._due_epoch(decision.samples)
        self.state.cool = self.state.bad + self._section.cooldown_epochs

    def _due_epoch(self, samples: int) -> float:
        """Return the epoch at which the last evaluation up to a sample counter was due."""
        return float(periods_done(samples, self._every_epochs, self._num_samples) * decimal(self._every_epochs))
