"""The forward pass of a network over a micro-batch: from its samples to their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.nn.parameters import input_type


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward pass on one rank."""

    inputs: Any
    """k·γ samples: (k·γ, C, H, W) images, (k·γ, features), or the inputs of a custom forward."""
    targets: Any
    """(k·γ,) classes, int64; (k·γ, C) probabilities of the classes, with Mixup or CutMix; or the targets of a custom
    forward."""
    slots: tuple[int, ...]
    """Position of each of its k ghost batches in the update, 0 … B/γ - 1."""
    digest: int = 0
    """`consumed.digest` of its samples."""
    replaced: Sequence[tuple[int, int]] = ()
    """(stream index, sample id) of each of its samples that replaced a bad one."""
    keys: Tensor | None = None
    """(k·γ,), `nn.dropout.sample_keys`; needed only if the network has keyed dropout."""


@dataclass(frozen=True)
class Losses:
    """The result of a forward pass over a micro-batch."""

    each: Tensor
    """(k·γ,): the loss of each sample, attached to the autograd graph; not averaged. With `weights`, it includes the
    weight: for instance the sum of the losses of a sample's tokens."""
    weights: Tensor | None = None
    """(k·γ,): the weight of each sample, such as the number of its tokens; None: 1 each. The gradient of an update is
    the gradient of the sum of all its losses, divided once by the sum of all its weights. Weights are at least 0.
    Exact mode sums them in multiples of 2⁻²⁴."""
    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    """For each metric a sum and a count, numbers or tensors (); the metric is the sum over the updates of a record,
    divided by their count. For the record only. Every micro-batch has the same metrics."""


Forward = Callable[[nn.Module, MicroBatch], Losses]


def classify(rule: UpdateSection) -> Forward:
    """Return a forward that computes the cross-entropy of logits and targets in float32 or better.

    The targets are classes or probabilities of the classes; the accuracy is that of the most probable class.

    Args:
        rule: gives precision and label smoothing.
    """

    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        inputs = as_parameters(micro_batch.inputs, model)
        targets = micro_batch.targets.to(inputs.device, non_blocking=True)
        with autocast(inputs.device, rule.precision):
            logits = model(inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        is_soft = targets.is_floating_point()
        each = nn.functional.cross_entropy(
            logits,
            targets.to(logits.dtype) if is_soft else targets,
            reduction="none",
            label_smoothing=rule.label_smoothing,
        )
        classes = targets.argmax(1) if is_soft else targets
        return Losses(each, metrics={"top1": ((logits.detach().argmax(1) == classes).sum(), len(classes))})

    return forward


def as_parameters(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return inputs on the device of a model's parameters, with the type of `input_type`."""
    return inputs.to(next(model.parameters()).device, input_type(model), non_blocking=True)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return torch's autocast to a type given by name; for float32 and tf32, a context that does nothing."""
    if precision in {"float32", "tf32"}:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
