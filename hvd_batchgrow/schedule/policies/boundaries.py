"""The base class of policies that act at given epochs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.types import FloatList, Fraction, tuples
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.policy import BatchPolicy
from hvd_batchgrow.schedule.stages import Start

AtLeastOne = Annotated[float, Field(ge=1)]
Factor = Annotated[AtLeastOne | tuple[AtLeastOne, ...], BeforeValidator(tuples)]


def boundary_faults(key: str, boundaries: Sequence[float], epochs: float) -> list[Fault]:
    """Return faults of boundaries, in epochs, that do not rise or are not before the end of the run."""
    late = [boundary for boundary in boundaries if boundary >= epochs]
    faults = [f"must rise: {b:g} follows {a:g}" for a, b in itertools.pairwise(boundaries) if b <= a]
    faults += [f"must end before epochs = {epochs:g}, got {late[0]:g}"] if late else []
    nearest = [boundary for boundary in sorted(set(boundaries)) if boundary < epochs]
    return [Fault(f"schedule.{key}", f"{fault}; nearest: {nearest}") for fault in faults]


class BoundaryPolicy(BatchPolicy):
    """The keys of policies that act at given epochs."""

    boundaries_epochs: FloatList = ()
    """Epochs at which the noise scale is divided by `noise_factor`."""
    noise_factor: Factor = 5.0
    """Factor that divides the noise scale at a boundary: one number, or one for each boundary."""
    momenta: Annotated[tuple[Fraction, ...], BeforeValidator(tuples)] | None = None
    """Momentum of each phase, for Adam β₁. For sgd and lars, what changes at the boundary compensates: the batch, or
    with `decay` and at the decaying boundaries of `hybrid` the learning rate. None: constant."""

    def targets(self, start: Start) -> list[tuple[float, float, float]]:
        """Return epoch, noise scale and momentum of each stage. Raises JobError."""
        epochs, fallen = (0.0, *self.boundaries_epochs), self.fallen()
        momenta = (start.momentum,) * len(epochs) if self.momenta is None else self.momenta
        faults = []
        if len(fallen) != len(epochs):
            num_epochs = len(epochs) - 1
            counts = f"{counted(len(fallen) - 1, 'factor')}, and boundaries_epochs has {counted(num_epochs, 'epoch')}"
            faults.append(Fault("schedule.noise_factor", f"{counts}; give one number, or one for each boundary"))
        if len(momenta) != len(epochs) or momenta[0] != start.momentum:
            fault = f"needs one for each of the {len(epochs)} phases, the first {start.momentum:g}, got {list(momenta)}"
            faults.append(Fault("schedule.momenta", fault))
        if faults:
            raise JobError(faults)
        return [(epoch, start.first_noise / r, m) for epoch, r, m in zip(epochs, fallen, momenta, strict=True)]

    def fallen(self) -> list[float]:
        """Return the factor by which the noise scale must have fallen at each stage: 1, f₁, f₁ f₂, …"""
        given, count = self.noise_factor, len(self.boundaries_epochs)
        factors = given if isinstance(given, tuple) else (given,) * count
        return list(itertools.accumulate(factors, lambda a, b: a * b, initial=1.0))

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        faults = boundary_faults("boundaries_epochs", self.boundaries_epochs, self.epochs)
        if self.rule in {"adam", "adam_linear"} and self.momenta is not None:
            fault = f"set β₁ of each phase, and so does lr_rule = {self.rule!r}; remove one"
            faults.append(Fault("schedule.momenta", fault))
        return faults

    def stated_decay(self, job: Job) -> tuple[tuple[float, ...], float | tuple[float, ...]] | None:
        return (self.boundaries_epochs, self.noise_factor) if self.rule == "none" else None

    def no_growth(self) -> str | None:
        return None if self.boundaries_epochs else "schedule.boundaries_epochs is empty"
