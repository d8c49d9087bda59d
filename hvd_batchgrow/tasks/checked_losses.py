"""Call a task, and check what it returns: a custom task may return anything."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.tasks.task import Losses, Task


def losses_of(task: Task, outputs: Any, targets: Any, num_samples: int, *, training: bool) -> Losses:
    """Return what a task returns for some samples, with its metrics detached and in the order of `task.metrics`.

    Args:
        task: is called.
        outputs: see `Task`.
        targets: see `Task`.
        num_samples: n.
        training: see `Task`.

    Raises:
        RunError: it is not `Losses` with a loss of each sample, a weight of each sample if there are weights, a bool of
            each sample if there is `correct`, and a sum and a count of each of `task.metrics`; or the weights have a
            gradient.
    """
    found = task(outputs, targets, training=training)
    name, when = f"the task {type(task).__name__}", "in training" if training else "in an evaluation"
    if not isinstance(found, Losses):
        raise RunError(f"{name} returned {type(found).__name__} {when}; it must return Losses(each, weights, metrics)")
    for what, values in (("each", found.each), ("weights", found.weights), ("correct", found.correct)):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != (num_samples,) and (what == "each" or values is not None):
            fault = f"{name} returned {what} of shape {shape} for {num_samples} samples {when}"
            raise RunError(f"{fault}; it must have a number for each sample, ({num_samples},), without a mean or sum")
    if wrong := weights_fault(found.weights) or metrics_fault(found.metrics):
        raise RunError(f"{name} {wrong}")
    if found.correct is not None and found.correct.dtype != torch.bool:
        given = f"{name} returned correct of type {found.correct.dtype} {when}"
        raise RunError(f"{given}; it must have type torch.bool, such as outputs.argmax(1) == targets")
    if {*found.metrics} != {*task.metrics}:
        given = f"the metrics {sorted(found.metrics)} {when}"
        raise RunError(f"{name} returned {given}, and its attribute metrics has {sorted(task.metrics)}")
    metrics = {metric: _detached(*found.metrics[metric]) for metric in task.metrics}
    return Losses(found.each, found.weights, metrics, found.correct)


def weights_fault(weights: Tensor | None) -> str | None:
    """Return a fault if weights have a gradient, as the second term of a loss has; it would be ignored."""
    if weights is None or not weights.requires_grad:
        return None
    fault = "returned Losses(each, weights), and the weights have a gradient"
    return f"{fault}; add the terms of a loss: Losses(a + b), or detach the weights"


def metrics_fault(metrics: Any) -> str | None:
    """Return why metrics are not sums and counts by name, as the end of a sentence; None if they are."""
    if not isinstance(metrics, Mapping):
        given = f"returned {type(metrics).__name__} as metrics"
        return f'{given}; they must be a dict of sums and counts, such as {{"top1": (num_correct, num_samples)}}'
    return next((fault for name, value in metrics.items() if (fault := _pair_fault(name, value))), None)


def _pair_fault(metric: str, value: Any) -> str | None:
    parts = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(parts) == 2 and all(map(_is_number, parts)):
        return None
    shown = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    found = f"two values of the forms {shown[0]} and {shown[1]}" if len(shown) == 2 else type(value).__name__
    fault = f"returned {found} for the metric {metric!r}"
    return f"{fault}; it must be a pair of a sum and a count, each a number or a tensor of shape ()"


def _is_number(value: Any) -> bool:
    return not value.dim() if isinstance(value, Tensor) else isinstance(value, Real)


def _detached(*parts: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    total, count = (part.detach() if isinstance(part, Tensor) else part for part in parts)
    return total, count
