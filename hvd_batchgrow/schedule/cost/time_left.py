"""Estimate the time that a run still needs, from the updates that it has done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hvd_batchgrow.schedule.cost.step_time import nonnegative_fit
from hvd_batchgrow.schedule.plan import Plan


@dataclass(frozen=True)
class PhaseSize:
    """Where a phase begins and ends, its batch, and the ranks that share it."""

    start_samples: int
    end_samples: int
    global_batch: int
    ranks: int


def phase_sizes(plan: Plan) -> tuple[PhaseSize, ...]:
    """Return the sizes of the phases of a plan."""
    return tuple(
        PhaseSize(phase.start_samples, phase.end_samples, phase.global_batch, layout.ranks)
        for phase, layout in zip(plan.schedule.phases, plan.layouts, strict=True)
    )


@dataclass
class TimeLeft:
    """Fits T = f + b n to the updates of a run; n is the samples of an update per rank, f and b are at least 0.

    Until updates of two sizes are known, T is proportional to n, which is too long for a batch that grows later.
    """

    _seen: dict[float, tuple[float, float]] = field(default_factory=dict)
    """For each n, the number of updates and their seconds."""

    @property
    def num_sizes(self) -> int:
        """Number of sizes of updates that are known."""
        return len(self._seen)

    def add(self, samples_per_rank: float, num_updates: int, seconds: float) -> None:
        """Add updates of one size. Updates of the same size that were added before count half."""
        updates, total = self._seen.get(samples_per_rank, (0.0, 0.0))
        self._seen[samples_per_rank] = updates / 2 + num_updates, total / 2 + seconds

    def seconds(self, phases: Sequence[PhaseSize], samples: int) -> list[float] | None:
        """Return the seconds that are left in each phase; None before the first update.

        Args:
            phases: of the plan, as it is known now.
            samples: the sample counter.
        """
        if not self._seen:
            return None
        sizes = np.array(list(self._seen))
        each = np.array([total / updates for updates, total in self._seen.values()])
        if len(sizes) == 1:
            fixed_s, sample_s = 0.0, float(each[0] / sizes[0])
        else:
            fixed_s, sample_s = map(float, nonnegative_fit(np.stack([np.ones_like(sizes), sizes], 1), each, each))
        return [
            max(0, phase.end_samples - max(samples, phase.start_samples))
            / phase.global_batch
            * (fixed_s + sample_s * phase.global_batch / phase.ranks)
            for phase in phases
        ]
