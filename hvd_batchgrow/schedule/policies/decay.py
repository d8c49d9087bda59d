"""`policy = "decay"`."""

from __future__ import annotations

from typing import ClassVar, Literal

from hvd_batchgrow.schedule.policies.boundaries import BoundaryPolicy
from hvd_batchgrow.schedule.policy import POLICIES
from hvd_batchgrow.schedule.stages import Stage, Start


@POLICIES.add
class DecaySchedule(BoundaryPolicy):
    """Divide the learning rate by f at every boundary; the batch stays."""

    policy: Literal["decay"]

    states_batches: ClassVar[bool] = True
    is_own_twin: ClassVar[bool] = True

    def stages(self, start: Start) -> list[Stage]:
        return [
            start.stage(epoch, noise, momentum, start.global_batch) for epoch, noise, momentum in self.targets(start)
        ]
