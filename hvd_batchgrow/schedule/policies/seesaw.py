"""`policy = "seesaw"`."""

from __future__ import annotations

from typing import ClassVar, Literal

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.optim import AdamSection
from hvd_batchgrow.config.schedules import GrowthKeys
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.policies.boundaries import BoundaryPolicy
from hvd_batchgrow.schedule.policy import POLICIES
from hvd_batchgrow.schedule.stages import Stage, Start


@POLICIES.add
class SeesawSchedule(GrowthKeys, BoundaryPolicy):
    """Divide the learning rate by √f and multiply the batch by f at every boundary, for Adam.

    The normalized noise scale then falls by f, as if the learning rate were divided by f at a constant batch. At the
    limit of the batch the learning rate decays by the remaining factor. The rule holds up to the critical batch. It
    requires a learning-rate factor of at least the square root of the batch factor; here it equals the root.

    Source: Seesaw (2025).
    """

    policy: Literal["seesaw"]

    normalizes_gradients: ClassVar[bool] = True

    def stages(self, start: Start) -> list[Stage]:
        return [
            start.stage(epoch, noise, momentum, start.global_batch * fallen)
            for (epoch, noise, momentum), fallen in zip(self.targets(start), self.fallen(), strict=True)
        ]

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        faults = super().faults(job, num_samples)
        if not isinstance(job.optim, AdamSection):
            fault = f"'seesaw' is for optim.name = 'adam' or 'adamw', not {job.optim.name!r}; use 'grow'"
            faults.append(Fault("schedule.policy", fault))
        if self.exact_noise:
            fault = "is for plain gradients, but 'seesaw' uses the noise of Adam, ε/√B; remove it"
            faults.append(Fault("schedule.exact_noise", fault))
        return faults
