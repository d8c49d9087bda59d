"""The run from which a growth schedule is advised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.adaptive.noise_record import Observation

MIN_FACTOR = 1.25
"""Smallest growth that is worth a phase; the triggers' default."""
_STAYED = 1.05
"""Factor below which a fall of the noise scale is only rounding."""


@dataclass(frozen=True)
class RecordedRun:
    """Schedule and gradient noise that a run folder has recorded."""

    folder: str
    """Name of the folder in messages."""
    job: Job
    num_samples: int
    """N."""
    num_updates: int
    """Updates of its plan, done or not."""
    phases: tuple[Mapping[str, Any], ...]
    """Phases of plan.json."""
    seen: tuple[Observation, ...]

    @property
    def first_batch(self) -> int:
        """B at sample 0."""
        return int(self.phases[0]["global_batch"])

    @property
    def ranks(self) -> int:
        """The most ranks of any update."""
        return max(int(phase["ranks"]) for phase in self.phases if phase["num_updates"])

    @property
    def falls(self) -> list[float]:
        """Factor by which the noise scale has fallen in each phase; a rise counts as constant."""
        first = self.phases[0]["noise_scale"]
        return list(itertools.accumulate((first / phase["noise_scale"] for phase in self.phases), max))

    @property
    def noise_fell(self) -> bool:
        """Whether the noise scale fell by more than rounding, because ε decayed or B grew."""
        return self.falls[-1] > _STAYED

    @property
    def rise_epoch(self) -> float | None:
        """Start of the first phase whose noise scale is above that of a phase before; None: it never rises."""
        first = self.phases[0]["noise_scale"]
        for phase, fall in zip(self.phases, self.falls, strict=True):
            if phase["noise_scale"] > _STAYED * first / fall:
                return float(phase["start_epoch"])
        return None

    @property
    def unit(self) -> int:
        """Samples of which every batch that the run's ranks can form is a multiple."""
        first, every = self.first_batch, self.job.model.ghost_batch * self.ranks
        return every if first % every == 0 else first

    @property
    def least_growth(self) -> int:
        """The smallest batch to which the run may grow from its first one."""
        return math.ceil(MIN_FACTOR * self.first_batch / self.unit) * self.unit
