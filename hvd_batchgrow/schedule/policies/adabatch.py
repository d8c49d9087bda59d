"""`policy = "adabatch"`."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hvd_batchgrow.config.schedules import GrowthKeys
from hvd_batchgrow.config.types import PositiveFloat
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.policy import POLICIES, BatchPolicy
from hvd_batchgrow.schedule.rounding import decimal
from hvd_batchgrow.schedule.stages import Stage, Start

_MOST_STAGES = 1000


@POLICIES.add
class AdaBatchSchedule(GrowthKeys, BatchPolicy):
    """Every `every_epochs`, multiply the batch by β and the learning rate by α: the noise scale falls by β/α.

    With `exact_noise` the batch lowers the exact noise scale by β, and so never reaches N.

    Source: Devarakonda et al. 2017 (arXiv 1712.02029).
    """

    policy: Literal["adabatch"]
    every_epochs: PositiveFloat
    """Epochs between steps."""
    batch_factor: Annotated[float, Field(ge=1)] = 2.0
    """β: factor of the batch at each step."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.75
    """α: factor of the learning rate at each step; the noise scale falls by β/α."""

    factor_key: ClassVar[str] = "batch_factor"

    def stages(self, start: Start) -> list[Stage]:
        every = decimal(self.every_epochs)
        count = math.ceil(decimal(self.epochs) / every)
        if count > _MOST_STAGES:
            fault = f"{self.epochs:g} epochs by {self.every_epochs:g} are {count} phases, at most {_MOST_STAGES}"
            raise JobError([Fault("schedule.every_epochs", fault)])
        stages = []
        for k in range(count):
            lr, grown = start.lr * self.lr_factor**k, self.batch_factor**k
            noise, wanted = start.first_noise * self.lr_factor**k / grown, start.global_batch * grown
            if self.exact_noise:
                wanted = start.noise.batch_for(noise, start.momentum, lr)
            stages.append(start.stage(float(k * every), noise, start.momentum, wanted))
        return stages
