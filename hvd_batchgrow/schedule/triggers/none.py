"""`name = "none"`."""

from __future__ import annotations

from typing import ClassVar, Literal

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.trigger import TRIGGERS, Trigger, TriggerRule


@TRIGGERS.add
class NoTrigger(Trigger):
    """No trigger: the schedule is fixed."""

    name: Literal["none"]

    decides: ClassVar[bool] = False

    def make(self, job: Job, num_samples: int) -> TriggerRule:
        raise NotImplementedError("a fixed schedule has no trigger")
