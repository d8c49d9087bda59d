"""`policy = "late"`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import GrowthKeys, LrRuleKeys, ShareOfN
from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.schedule.policy import POLICIES, BatchPolicy
from hvd_batchgrow.schedule.stages import Stage, Start


@POLICIES.add
class LateSchedule(GrowthKeys, LrRuleKeys, BatchPolicy):
    """Hold the first batch for a fraction of the samples, then grow it to `max_batch`, at a constant learning rate.

    With k = `growth_steps`, the rest of the run has k equal parts. In the i-th part, the batch is B₀ (B_max/B₀)^(i/k).

    Source: Wang et al. 2026 (arXiv 2602.14208): on hard tasks, late growth costs no accuracy, and early growth
    does. The right fraction depends on the task.
    """

    policy: Literal["late"]
    hold_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the run's samples that are trained with the first batch."""
    growth_steps: PositiveInt = 1
    """Number of steps in which the batch grows, each by the same factor."""
    max_batch: PositiveInt | ShareOfN
    """Batch after the last step: samples, or "N/10"."""

    def stages(self, start: Start) -> list[Stage]:
        assert start.max_batch is not None
        stages, growth = [start.first_stage], start.max_batch / start.global_batch
        for step in range(self.growth_steps):
            wanted = start.global_batch * growth ** ((step + 1) / self.growth_steps)
            rest = (1 - self.hold_fraction) * step / self.growth_steps
            noise = start.noise.of(start.lr, start.momentum, wanted)
            stages.append(start.stage(self.epochs * (self.hold_fraction + rest), noise, start.momentum, wanted))
        return stages if self.lr_rule == "none" else [replace(stage, lr=start.lr) for stage in stages]

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        limit = self.limit(num_samples, self.batch_unit(job.model.ghost_batch))
        if limit is None or limit > self.first_batch:
            return []
        fault = f"{self.max_batch} is {limit} samples, not above the first batch of {self.first_batch}"
        return [Fault("schedule.max_batch", f"{fault}: the batch would never grow; use more, or policy = 'steps'")]
