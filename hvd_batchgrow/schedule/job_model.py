"""The model that a job file is checked against."""

from __future__ import annotations

from functools import cache, reduce
from operator import or_
from typing import Any

from pydantic import Field, create_model

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.policy import POLICIES
from hvd_batchgrow.schedule.trigger import TRIGGERS
from hvd_batchgrow.schedule.triggers.none import NoTrigger


@cache
def job_model() -> type[Job]:
    """Return `Job` with one variant of `[schedule]` for each policy, and of `[trigger]` for each trigger."""
    policies: Any = reduce(or_, POLICIES.sections())
    triggers: Any = reduce(or_, TRIGGERS.sections())
    return create_model(
        "Job",
        __base__=Job,
        schedule=(policies, Field(discriminator="policy")),
        trigger=(triggers, Field(default=NoTrigger(name="none"), discriminator="name")),
    )
