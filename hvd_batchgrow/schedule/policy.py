"""A policy: its keys, their checks, and the stages that it makes of them. Each is a file of `schedule/policies/`.

Every policy says by how much the noise scale must have fallen, and whether the batch or the learning rate changes. The
learning rate corrects for a batch that was rounded to whole ghost batches or cut at its limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import ScheduleBase
from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.config.variants import Variants
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.lr_rule import apply_lr_rule
from hvd_batchgrow.schedule.stages import Stage, Start
from hvd_batchgrow.schedule.weight_decay import apply_weight_decay_rule


class Policy(ScheduleBase):
    """Base class of the `[schedule]` sections of all policies."""

    states_batches: ClassVar[bool] = False
    """Whether the job file states every batch, so that no growth is not a surprise."""
    factor_key: ClassVar[str] = "noise_factor"
    """The key that says by how much the batch grows."""

    def stages(self, start: Start) -> list[Stage]:
        """Return the stages in the order of their epochs, the first at 0, before `lr_rule`. Raises JobError."""
        return [start.first_stage]

    def course(self, job: Job, start: Start, decisions: Sequence[Decision]) -> tuple[list[Stage], float]:
        """Return the stages and the epoch at which the run ends.

        Args:
            job: the job with this section.
            start: the result of `make_start`.
            decisions: decisions of the job's trigger so far.
        """
        return self.stages(start), self.epochs

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        """Return the faults of this policy's keys, and of keys that contradict them."""
        return []

    def batch_faults(self, job: Job, start: Start, ranks: int) -> list[Fault]:
        """Return the faults of batches that these ranks may have to form later."""
        return []

    def stated_batches(self, cap: int | None) -> list[tuple[str, int]]:
        """Return key and samples of each batch that the job file states; `cap` is the limit in samples."""
        limits = [("schedule.max_batch", cap)] if cap else []  # 0 is reported as below the first batch
        return [("schedule.global_batch", self.first_batch), *limits]

    def stated_decay(self, job: Job) -> tuple[tuple[float, ...], float | tuple[float, ...]] | None:
        """Return epochs and factors of the falls of the noise scale, if the job file states them."""
        return None

    def no_growth(self) -> str | None:
        """Return which key keeps the batch from growing, if one does."""
        return None


class BatchPolicy(Policy):
    """Base class of policies with a first batch."""

    global_batch: PositiveInt
    """B: samples per update at the start, over all ranks and micro-batches."""

    @property
    def first_batch(self) -> int:
        """B₀ in samples, as written in the job file."""
        return self.global_batch


POLICIES = Variants("hvd_batchgrow.schedule.policies", "policy")


def policy_of(job: Job) -> Policy:
    """Return a job's `[schedule]`."""
    assert isinstance(job.schedule, Policy)
    return job.schedule


def compile_stages(job: Job, start: Start, decisions: Sequence[Decision] = ()) -> tuple[list[Stage], float]:
    """Return the stages of a job's policy, trigger and learning-rate rule, and the epoch at which it ends.

    Raises JobError.
    """
    try:
        stages, epochs = policy_of(job).course(job, start, decisions)
        if start.wanted_batch is not None and stages[0].global_batch == start.global_batch:
            stages = [replace(stages[0], wanted_batch=start.wanted_batch), *stages[1:]]
        return apply_weight_decay_rule(apply_lr_rule(stages, job), job), epochs
    except JobError as error:
        raise JobError(error.faults, job.name) from None
