"""`policy = "hybrid"`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import GrowthKeys
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.policies.boundaries import BoundaryPolicy
from hvd_batchgrow.schedule.policy import POLICIES
from hvd_batchgrow.schedule.stages import Stage, Start


@POLICIES.add
class HybridSchedule(GrowthKeys, BoundaryPolicy):
    """Grow the batch at the first `growing_boundaries` boundaries and divide the learning rate at the others.

    Source: Smith et al. 2018, figure 1.
    """

    policy: Literal["hybrid"]
    growing_boundaries: Annotated[int, Field(ge=0)] = 1
    """Number of boundaries that grow the batch; the later ones divide the learning rate."""

    def stages(self, start: Start) -> list[Stage]:
        stages: list[Stage] = []
        for k, (epoch, noise, momentum) in enumerate(self.targets(start)):
            grows = k <= self.growing_boundaries
            wanted = start.noise.batch_for(noise, momentum, start.lr) if grows else float(stages[-1].global_batch)
            stages.append(start.stage(epoch, noise, momentum, wanted))
        return stages

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        faults, count = super().faults(job, num_samples), len(self.boundaries_epochs)
        if self.growing_boundaries > max(1, count):
            fault = f"{self.growing_boundaries} of {count} boundaries; nearest: {count}, which is policy = 'grow'"
            faults.append(Fault("schedule.growing_boundaries", fault))
        return faults

    def no_growth(self) -> str | None:
        return super().no_growth() or (None if self.growing_boundaries else "schedule.growing_boundaries is 0")
