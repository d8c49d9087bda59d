"""The base class of triggers that calculate a batch from the statistics of the gradient."""

from __future__ import annotations

from abc import abstractmethod
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.types import PositiveFloat
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.rounding import decimal
from hvd_batchgrow.schedule.stages import Start
from hvd_batchgrow.schedule.trigger import Measurement, RuleState, TriggerRule, WindowTrigger


class FormulaState(RuleState):
    """Since when the formula has exceeded the batch."""

    asks_since: NonNegativeInt | None = None
    """Sample counter; None: it does not."""


class FormulaTrigger(WindowTrigger):
    """The keys of triggers that calculate a batch from the statistics of the gradient."""

    every_epochs: PositiveFloat = 0.05
    """Epochs between two checks of the trigger."""
    max_batch_factor: Annotated[float, Field(gt=1)] = 2.0
    """Largest factor by which one decision multiplies the batch."""
    min_factor: Annotated[float, Field(ge=1)] = 1.25
    """Smallest factor by which a decision multiplies the batch; smaller requests are ignored."""

    measures_gradients: ClassVar[bool] = True
    state_model: ClassVar[type[RuleState]] = FormulaState

    @abstractmethod
    def formula(self, now: Measurement) -> tuple[float, str] | None:
        """Return the batch in samples and the arithmetic in words; None if it cannot be calculated."""

    @property
    def hold(self) -> float:
        """Epochs for which the formula must exceed the current batch before it is requested."""
        return 0.0

    @property
    def factor(self) -> float:
        """Largest factor of the batch."""
        return self.max_batch_factor

    def forced(self, batch: int, why: str) -> BatchRequest:
        most = self.max_batch_factor * batch
        return BatchRequest(why, batch=most, most=most)

    def make(self, job: Job, num_samples: int) -> FormulaRule:
        return FormulaRule(self, decimal(self.hold) * num_samples)

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        faults = super().faults(job, num_samples)
        if self.min_factor > self.max_batch_factor:
            most = f"max_batch_factor = {self.max_batch_factor:g}"
            fault = f"{self.min_factor:g} is above {most}: the batch would never grow"
            faults.append(Fault("trigger.min_factor", fault))
        return faults

    def batch_faults(self, job: Job, start: Start) -> list[Fault]:
        """Return a fault if rounding cancels `max_batch_factor`: then not even the end of a window grows the batch."""
        first, unit, factor = start.global_batch, start.batch_unit, self.max_batch_factor
        if start.whole(factor * first) > first:
            return []
        fault = f"{factor:g} × {first} = {factor * first:g} is below {first + unit}, the next whole multiple of {unit}"
        remedy = f"nearest: {(first + unit) / first:g}; or a smaller schedule.batch_multiple"
        return [Fault("trigger.max_batch_factor", f"{fault}: the batch would never grow; {remedy}")]

    def waits(self) -> dict[str, float]:
        """Return the keys that delay the first decision. It is made at the end of a window in any case."""
        return {} if self.windows_epochs else {"hold_epochs": self.hold, "every_epochs": self.every_epochs}


class FormulaRule(TriggerRule):
    """Requests the batch of the section's formula, optionally only after it has held for some time.

    Args:
        section: the job's section.
        hold_samples: samples for which the formula must exceed the current batch before it is requested.
    """

    state: FormulaState

    def __init__(self, section: FormulaTrigger, hold_samples: Fraction = Fraction(0)) -> None:
        self._section, self._hold_samples, self.state = section, hold_samples, FormulaState()

    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request between `min_factor` and `max_batch_factor` times the current batch."""
        result = self._section.formula(now)
        if result is None or not result[0] > now.global_batch:  # also where it is NaN
            self.state.asks_since = None
            return None
        if self.state.asks_since is None:
            self.state.asks_since = now.samples
        if now.samples - self.state.asks_since < self._hold_samples:
            return None
        most = self._section.max_batch_factor * now.global_batch
        batch, why = min(result[0], most), result[1]
        if batch < self._section.min_factor * now.global_batch:
            return None
        return BatchRequest(why, batch=batch, most=most)

    def decided(self, decision: Decision) -> None:
        """Start the holding time again."""
        self.state.asks_since = None
