"""The task `regression`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import TASKS, Direction
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.tasks.alignment import aligned
from hvd_batchgrow.tasks.task import Losses


class Regression:
    """K numbers per sample.

    Outputs are (n, K); targets are (n, K) of a floating type. The loss of a sample is the mean over its targets of the
    squared error, of the absolute error, or of Huber's loss (Huber 1964, as in torch's `huber_loss`), of the
    standardized values. Metrics are the mean absolute error `mae` and the mean squared error `mse` in the units of the
    targets.

    Args:
        loss: "mse", "l1" or "huber".
        huber_delta: error from which Huber's loss is linear.
        mean: (K,) the network learns (target - mean) / std.
        std: (K,), above 0.
    """

    metrics: Mapping[str, Direction] = TASKS["regression"].metrics

    def __init__(self, loss: str, huber_delta: float, mean: Tensor, std: Tensor) -> None:
        self.loss, self.huber_delta, self.mean, self.std = loss, huber_delta, mean, std

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        """See `Task`."""
        if self.mean.device != outputs.device:
            self.mean, self.std = self.mean.to(outputs.device), self.std.to(outputs.device)
        wanted = (aligned(targets, outputs) - self.mean) / self.std
        if self.loss == "huber":
            each = functional.huber_loss(outputs, wanted, reduction="none", delta=self.huber_delta)
        else:
            loss = functional.mse_loss if self.loss == "mse" else functional.l1_loss
            each = loss(outputs, wanted, reduction="none")
        errors = ((outputs.detach() - wanted) * self.std).double()
        metrics = {"mae": (errors.abs().sum(), errors.numel()), "mse": (errors.square().sum(), errors.numel())}
        return Losses(each.mean(1), metrics=metrics)


def load(section: TaskSection, num_outputs: int, schema: Mapping[str, Any]) -> Regression:
    """Return the task of a section, with the mean and std of the training targets if `standardize` is true.

    Raises:
        JobError: `standardize` is true, and the source does not state the mean and std of its targets, K finite
            numbers each, or a std is not above 0.
    """
    mean, std = torch.zeros(num_outputs), torch.ones(num_outputs)
    if section.standardize:
        mean, std = (_numbers(schema, key, num_outputs) for key in ("target_mean", "target_std"))
        if not (std > 0).all():
            fault = f'schema["target_std"] of the source must be above 0, is {schema["target_std"]!r}'
            raise JobError([Fault("task.standardize", f"{fault}; use 1 for a target that is constant")])
    return Regression(section.loss, section.huber_delta, mean, std)


def _numbers(schema: Mapping[str, Any], key: str, count: int) -> Tensor:
    """Return an entry of a source's schema as float32 (K,). Raises JobError unless it has K finite numbers."""
    if key not in schema:
        fault = (
            'needs the source\'s schema["target_mean"] and schema["target_std"], K numbers each; a torch Dataset '
            "standardizes its targets itself"
        )
        raise JobError([Fault("task.standardize", fault)])
    try:
        numbers = torch.tensor(schema[key], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):  # no numbers, lists of different lengths, or too large for float32
        numbers = torch.empty(0)
    if numbers.shape != (count,) or not numbers.isfinite().all():
        fault = f'schema["{key}"] of the source must be {count} finite numbers (float32), is {schema[key]!r}'
        raise JobError([Fault("task.standardize", fault)])
    return numbers
