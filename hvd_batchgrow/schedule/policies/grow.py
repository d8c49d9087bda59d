"""`policy = "grow"`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hvd_batchgrow.config.schedules import LrRule, MaxBatch
from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.schedule.policies.boundaries import BoundaryPolicy
from hvd_batchgrow.schedule.policy import POLICIES
from hvd_batchgrow.schedule.stages import Stage, Start


@POLICIES.add
class GrowSchedule(BoundaryPolicy):
    """Grow the batch so that the noise scale falls by f at every boundary, at a constant learning rate.

    An `lr_rule` alone sets the learning rate. Its κ follows the formed batch, so rounding and limit need no correction.

    Source: Smith et al. 2018 (arXiv 1711.00489), §2 and §5.
    """

    policy: Literal["grow"]
    max_batch: MaxBatch = None
    """Largest batch: samples, or "N/10". The learning rate decays instead once it is reached. None: no limit."""
    batch_multiple: PositiveInt | None = None
    """Every batch is a whole multiple of this, so that the ranks can form it. None: of `model.ghost_batch`."""
    lr_rule: LrRule = "none"
    """Factor of the learning rate when the batch has grown by κ: none: 1; linear: κ; sqrt: √κ; adam and adam_linear:
    √κ, with new β₁, β₂ and eps."""

    def stages(self, start: Start) -> list[Stage]:
        stages = [
            start.stage(epoch, noise, momentum, start.noise.batch_for(noise, momentum, start.lr))
            for epoch, noise, momentum in self.targets(start)
        ]
        return stages if self.lr_rule == "none" else [replace(stage, lr=start.lr) for stage in stages]
