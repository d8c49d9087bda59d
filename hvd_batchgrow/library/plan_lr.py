"""A torch learning-rate scheduler that follows a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from hvd_batchgrow.library.plan_batch_sampler import PlanBatchSampler
from hvd_batchgrow.library.updates import check_boundary
from hvd_batchgrow.optim.build import (
    FIRST_DECAY,
    check_momentum,
    lr_ratios,
    set_momentum,
    set_weight_decay,
    weight_decays,
)
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan


class PlanLR(LRScheduler):
    """Sets the learning rate, momentum and weight decay of a plan. Call `step()` after each `optimizer.step()`.

    `step()` advances the sample counter by the batch of the update, and sets the learning rate, with warm-up, and the
    momentum (β₁ of Adam) of the next update. The first parameter group has the plan's learning rate, and
    the other groups keep their ratio to it (or have `lr_scale`, as in timm). With `lr_rule = "adam"` or
    "adam_linear", it also sets β₂ and eps, from `optim` of `plan_updates`. The weight decay of each group changes only
    with `weight_decay_rule = "per_epoch"` there, by the same factor in all groups.

    Where a phase changes the momentum or the betas, `step()` adapts the optimizer's state. With
    `rescale_momentum = True` in `optim` of `plan_updates`, it scales the buffer to its new level. Nothing else changes
    the state, so it may be loaded before or after the scheduler is made.

    Args:
        optimizer: the optimizer to set.
        plan: of `plan_updates`.
        sampler: gives the first sample counter; afterwards each step of the scheduler sets the sampler's counter.

    Raises:
        ValueError: the first of several parameter groups has learning rate 0; or the plan has momentum, which the
            optimizer does not support.
    """

    phase: Phase
    """Learning rate, momentum and batch of the next update; after the end, those of the last one."""

    def __init__(self, optimizer: torch.optim.Optimizer, plan: Plan, sampler: PlanBatchSampler | None = None) -> None:
        self._schedule = plan.schedule
        self._sampler: PlanBatchSampler | None = None
        self._ratios, self._weight_decays = lr_ratios(optimizer), weight_decays(optimizer)
        if any(phase.weight_decay_factor is not None for phase in plan.schedule.phases):
            # In the optimizer's state, so that it may be loaded before this is made.
            for group, weight_decay in zip(optimizer.param_groups, self._weight_decays, strict=True):
                group[FIRST_DECAY] = weight_decay
        check_momentum(optimizer, max(phase.momentum for phase in plan.schedule.phases))
        self._rescales_momentum = getattr(plan.job.optim, "rescale_momentum", False)
        self._samples = 0
        self.phase = self._schedule.at(0)
        super().__init__(optimizer)  # which calls step() once
        if sampler:
            self._sampler = sampler
            sampler.moved_by_scheduler = True
            self.set_samples(sampler.samples)

    @property
    def samples(self) -> int:
        """Sample counter of the next update: samples of all updates so far, on all ranks."""
        return self._samples

    def get_lr(self) -> list[Any]:
        """Return the learning rate of each parameter group for the next update."""
        return [self.phase.lr * ratio for ratio in self._ratios]

    def step(self, epoch: int | None = None) -> None:
        """Count one update, and set the values of the next one.

        Args:
            epoch: must be None: a plan counts samples.

        Raises:
            ValueError: the plan has ended, or an epoch is given.
        """
        if epoch is not None:
            raise ValueError(f"PlanLR.step() counts one update and takes no epoch, got {epoch}; see set_samples")
        if self.last_epoch >= self._schedule.num_updates:
            raise ValueError(
                f"the plan ends after {self._schedule.num_updates} updates ({self._schedule.end_samples} samples), and "
                "step() was called once more: call it once per optimizer step"
            )
        # last_epoch counts updates; it is -1 when the constructor calls this.
        is_update = self.last_epoch >= 0
        self._move(self._samples + (self.phase.global_batch if is_update else 0), keeps_state=not is_update)

    def set_samples(self, samples: int) -> None:
        """Continue at another sample counter, with an optimizer whose state is that of the counter.

        Raises:
            ValueError: the counter is not an update boundary of the plan.
        """
        check_boundary(self._schedule, samples)
        done = self._schedule.updates_at(samples)
        self.last_epoch = done - 1
        self._step_count = 0  # as in the constructor: without torch's warning about the order of the calls
        self._move(samples, keeps_state=True)
        self._step_count = done + 1
        if self._sampler:
            self._sampler.set_samples(samples)

    def state_dict(self) -> dict[str, Any]:
        """Return the sample counter, under "samples"; all else follows from the plan."""
        return {"samples": self._samples}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue at a saved sample counter. Raises ValueError if it is not an update boundary of the plan."""
        self.set_samples(state_dict["samples"])

    def _move(self, samples: int, *, keeps_state: bool) -> None:
        self._samples = samples
        if samples < self._schedule.end_samples:
            self.phase = self._schedule.at(samples)
        super().step()
        set_momentum(self.optimizer, self.phase, rescale=self._rescales_momentum, keeps_state=keeps_state)
        set_weight_decay(self.optimizer, self.phase, self._weight_decays)
        if self._sampler:
            self._sampler.follow(samples)
