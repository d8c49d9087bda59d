"""A trigger: its keys, their checks, and the rule that turns measurements into requests for another batch.

Each trigger is a file of `schedule/triggers/`. The sample counter is a rule's only clock. Only rank 0 decides, with
numbers that the ranks have all-reduced. It broadcasts and records its decisions: see `train.growth_controller`.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.triggers import TriggerBase
from hvd_batchgrow.config.types import PositiveFloat, tuples
from hvd_batchgrow.config.variants import Variants
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.stages import Start

Window = tuple[Annotated[float, Field(ge=0)], PositiveFloat]

Evidence = tuple[dict[str, float], str]
"""What branches have shown, as numbers and in words; see `Measurement.branches`. Only rank 0 has it."""
NO_EVIDENCE: Evidence = ({}, "")


@dataclass(frozen=True)
class Measurement:
    """Measurements at an update boundary."""

    samples: int
    global_batch: int
    """B of the next update, if nothing changes."""
    lr: float
    """ε of the next update, if nothing changes, after warm-up and `lr_rule`."""
    trace: float | None = None
    """tr(Σ), averaged; None: not measured yet."""
    squared_norm: float | None = None
    """|G|², averaged, without the noise's contribution; not resolved if it is not above 0."""
    loss: float | None = None
    """Mean training loss, averaged."""
    metric: float | None = None
    """Metric of an evaluation at this counter; None: no evaluation, or its loss was not finite."""
    was_unusable: bool = False
    """Whether an evaluation at this counter had an infinite or NaN loss."""
    norm_layers_factor: float | None = None
    """The factor by which B_simple of the norm layers was multiplied; None: the estimator is "micro_batches"."""
    branches: dict[str, float] = field(default_factory=dict)
    """What branches from this counter have shown, such as `critical_batch`; empty: none were trained."""
    branches_text: str = ""
    """That in words."""

    @property
    def b_simple(self) -> float | None:
        """B_simple = tr(Σ)/|G|² in samples; None: not resolved, so the batch does not grow."""
        if not (is_positive(self.trace) and is_positive(self.squared_norm)):
            return None
        return self.trace / self.squared_norm

    @property
    def batch_squared_norm(self) -> float | None:
        """Expected |g|² of a gradient over B samples: |G|² + tr(Σ)/B."""
        if self.trace is None or self.squared_norm is None:
            return None
        return self.squared_norm + self.trace / self.global_batch

    def numbers(self) -> dict[str, Any]:
        """Return the known values, for the record, and the estimator of the noise if it is not "micro_batches"."""
        others = {"samples", "was_unusable", "branches", "branches_text"}
        values = {name: value for name, value in asdict(self).items() if name not in others}
        known = {name: value for name, value in values.items() if value is not None} | self.branches
        estimator = {} if self.norm_layers_factor is None else {"estimator": "norm_layers"}
        return known | estimator | ({} if self.b_simple is None else {"b_simple": self.b_simple})


class RuleState(BaseModel):
    """What a rule has seen so far, as plain values for a checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TriggerRule(ABC):
    """Requests another batch when measurements show that it is due."""

    state: RuleState

    @property
    def best_samples(self) -> int | None:
        """Sample counter of the best evaluation, for a trigger that restores its weights."""
        return None

    @abstractmethod
    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request, or None if nothing should change."""

    @abstractmethod
    def decided(self, decision: Decision) -> None:
        """Take note of a decision, made now or before the run resumed."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the plain values of a `state`."""
        self.state = type(self.state).model_validate(state)


class Trigger(TriggerBase):
    """Base class of the `[trigger]` sections of all triggers."""

    state_model: ClassVar[type[RuleState]] = RuleState
    """The class of its rule's state."""
    keeps_state: ClassVar[bool] = False
    """Whether a fork keeps the state of the rule if other keys than the name change."""

    @abstractmethod
    def make(self, job: Job, num_samples: int) -> TriggerRule:
        """Return the rule of a job with this section."""

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        """Return the faults of this trigger's keys in a job with an adaptive schedule."""
        return []

    def batch_faults(self, job: Job, start: Start) -> list[Fault]:
        """Return the faults of batches that leave every decision without effect."""
        return []

    def waits(self) -> dict[str, float]:
        """Return the keys that delay the first decision, and by how many epochs."""
        return {}

    def notes(self, job: Job, start: Start) -> list[str]:
        """Return lines on what the trigger will do, for a job without faults."""
        return []

    def unlikely_values(self) -> list[str]:
        """Return a line for each valid value that is rarely intended."""
        return []


class WindowTrigger(Trigger):
    """Base class of the triggers that decide in windows of epochs."""

    windows_epochs: Annotated[tuple[Window, ...], Field(min_length=1), BeforeValidator(tuples)] | None = None
    """[earliest, latest] epoch of the first, second, … decision, and the largest number of decisions. If a window ends
    without a decision, the trigger decides there, by `noise_factor` or `max_batch_factor`. None: no limits."""
    first_decision_epoch: Annotated[float, Field(ge=0)] | None = None
    """Earliest epoch of a decision. None: half of the run for a trigger that follows the gradient's noise, otherwise 0.
    Not with `windows_epochs`."""

    lowers_noise: ClassVar[bool] = False
    """Whether a decision lowers the noise scale: the learning rate decays when the batch cannot grow."""

    @property
    @abstractmethod
    def factor(self) -> float:
        """Factor by which a decision at the end of a window changes batch or noise scale."""

    @abstractmethod
    def forced(self, batch: int, why: str) -> BatchRequest:
        """Return the request at the end of a window, at this batch, in samples."""

    def earliest_epoch(self, epochs: float) -> float:
        """Return the earliest epoch of a decision in a run of `epochs` epochs, without windows."""
        default = epochs / 2 if self.measures_gradients else 0.0
        return default if self.first_decision_epoch is None else self.first_decision_epoch

    def no_growth(self, job: Job) -> str | None:
        """Return which keys keep the trigger from deciding before the run ends, if they do."""
        return None

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        """Return the faults of the windows."""
        edges = [edge for window in self.windows_epochs or () for edge in window]
        faults = [
            Fault("trigger.windows_epochs", f"[earliest, latest] must rise from window to window: {b:g} follows {a:g}")
            for k, (a, b) in enumerate(itertools.pairwise(edges))
            if b < a or (b == a and k % 2)
        ]
        if edges and edges[-1] >= job.schedule.epochs:
            fault = f"{edges[-1]:g} is not before epochs = {job.schedule.epochs:g}"
            faults.append(Fault("trigger.windows_epochs", fault))
        first, epochs = self.first_decision_epoch, job.schedule.epochs
        if first is not None and self.windows_epochs:
            fault = f"{first:g} conflicts with windows_epochs, which sets the earliest epochs of decisions: remove one"
            faults.append(Fault("trigger.first_decision_epoch", fault))
        elif first is not None and first >= epochs:
            fault = f"{first:g} is not before schedule.epochs = {epochs:g}, so the trigger would never decide; use less"
            faults.append(Fault("trigger.first_decision_epoch", fault))
        return faults


TRIGGERS = Variants("hvd_batchgrow.schedule.triggers", "name")


def trigger_of(job: Job) -> Trigger:
    """Return a job's `[trigger]`."""
    assert isinstance(job.trigger, Trigger)
    return job.trigger


def check_rule_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a trigger's rule; {} without a trigger. Raises ValueError if no trigger has such a state."""
    for section in TRIGGERS.sections():
        with suppress(ValidationError):
            section.state_model.model_validate(state)
            return state
    raise ValueError("is not the state of any trigger")


def make_trigger(job: Job, num_samples: int) -> TriggerRule:
    """Return the rule of the trigger of a job with an adaptive schedule."""
    return trigger_of(job).make(job, num_samples)


def bounded(
    request: BatchRequest | None, job: Job, num_samples: int, num_decisions: int, now: Measurement
) -> BatchRequest | None:
    """Drop requests before `first_decision_epoch` or outside `windows_epochs`; add one at the end of an unused window.

    Args:
        request: the trigger's request.
        job: the job with the windows.
        num_samples: N.
        num_decisions: number of decisions so far.
        now: the current batch and sample counter.
    """
    section = job.trigger
    if not isinstance(section, WindowTrigger):
        return request
    epoch = now.samples / num_samples
    if section.windows_epochs is None:
        return request if epoch >= section.earliest_epoch(job.schedule.epochs) else None
    if num_decisions >= len(section.windows_epochs):
        return None
    earliest, latest = section.windows_epochs[num_decisions]
    if epoch < earliest:
        return None
    if request is None and epoch >= latest:
        return section.forced(now.global_batch, f"the window of {earliest:g} … {latest:g} epochs ends")
    return request


def is_positive(value: float | None) -> TypeGuard[float]:
    """Return whether a number is known, above 0 and finite."""
    return value is not None and 0 < value < math.inf
