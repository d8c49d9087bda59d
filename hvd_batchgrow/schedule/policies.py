"""Policies: what a job wants at each boundary, before it is compiled to updates.

A policy is a plain function of the job and of N. It returns stages that start at the epochs
0, boundaries_epochs[0], boundaries_epochs[1], … To add one, write the function and name it in POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hvd_batchgrow.config import Job


@dataclass(frozen=True)
class Stage:
    """Learning rate, momentum and global batch from an epoch on."""

    start_epoch: float
    lr: float
    momentum: float
    global_batch: int


def decay(job: Job, num_samples: int) -> list[Stage]:
    """Divide the learning rate by `factor` at every boundary; the batch stays."""
    plan = job.schedule
    return [
        Stage(epoch, job.optim.lr / plan.factor**k, job.optim.momentum, plan.global_batch)
        for k, epoch in enumerate((0.0, *plan.boundaries_epochs))
    ]


def grow(job: Job, num_samples: int) -> list[Stage]:
    """Multiply the batch by `factor` at every boundary; the learning rate takes what the batch could not.

    With B* = B₀ fᵏ the batch wanted after k boundaries and B the one that can be had (B* rounded to
    whole groups, at most `max_batch`), ε = ε₀ B/B*: the noise scale falls by f each time, exactly.

    Source: Smith et al. 2018 (arXiv 1711.00489), §2 and §5.
    """
    plan, group = job.schedule, job.model.ghost_batch
    cap = batch_cap(plan.max_batch, num_samples, group)
    stages = []
    for k, epoch in enumerate((0.0, *plan.boundaries_epochs)):
        wanted = plan.global_batch * plan.factor**k
        rounded = plan.global_batch if k == 0 else _whole_groups(wanted, group)
        batch = rounded if cap is None else min(rounded, cap)
        stages.append(Stage(epoch, job.optim.lr * (batch / wanted), job.optim.momentum, batch))
    return stages


POLICIES: dict[str, Callable[[Job, int], list[Stage]]] = {"decay": decay, "grow": grow}


def batch_cap(max_batch: int | str | None, num_samples: int, group: int) -> int | None:
    """The largest batch allowed, in samples; "N/10" is rounded down to whole groups, a number is taken as it is."""
    if isinstance(max_batch, str):
        return num_samples // int(max_batch.removeprefix("N/")) // group * group
    return max_batch


def _whole_groups(samples: float, group: int) -> int:
    return max(1, round(samples / group)) * group
