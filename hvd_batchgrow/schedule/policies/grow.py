"""`policy = "grow"`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hvd_batchgrow.config.schedules import GrowthKeys, LrRuleKeys
from hvd_batchgrow.schedule.policies.boundaries import BoundaryPolicy
from hvd_batchgrow.schedule.policy import POLICIES
from hvd_batchgrow.schedule.stages import Stage, Start


@POLICIES.add
class GrowSchedule(GrowthKeys, LrRuleKeys, BoundaryPolicy):
    """Grow the batch so that the noise scale falls by f at every boundary, at a constant learning rate.

    An `lr_rule` alone sets the learning rate. Its κ follows the formed batch, so rounding and limit need no correction.

    Source: Smith et al. 2018 (arXiv 1711.00489), §2 and §5.
    """

    policy: Literal["grow"]

    def stages(self, start: Start) -> list[Stage]:
        stages = [
            start.stage(epoch, noise, momentum, start.noise.batch_for(noise, momentum, start.lr))
            for epoch, noise, momentum in self.targets(start)
        ]
        return stages if self.lr_rule == "none" else [replace(stage, lr=start.lr) for stage in stages]
