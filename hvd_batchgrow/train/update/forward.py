"""One pass of a network over a micro-batch: from its samples to their losses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.nn.parameters import input_type


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward on one rank."""

    inputs: Any
    """Of k·γ samples: (k·γ, C, H, W) images, (k·γ, features), or what a forward of your own takes."""
    labels: Any
    """(k·γ,), or what a forward of your own takes."""
    positions: tuple[int, ...]
    """Place of each of its k groups among the update's groups, 0 … B/γ - 1."""
    digest: int = 0
    """`consumed.digest` of its samples."""
    num_replaced: int = 0
    """How many of them stand in for bad ones."""
    keys: Tensor | None = None
    """(k·γ,), `nn.dropout.sample_keys`; needed only where the network has keyed dropout."""


@dataclass(frozen=True)
class Losses:
    """What a forward makes of a micro-batch."""

    each: Tensor
    """(k·γ,): the loss of each sample, with its gradient; not averaged."""
    num_correct: Tensor | int = 0
    """How many samples were told right; for the record only."""


Forward = Callable[[nn.Module, MicroBatch], Losses]


def classify(rule: UpdateSection) -> Forward:
    """Cross-entropy of a network's logits against labels, in float32 or better.

    Args:
        rule: gives precision and label smoothing.
    """

    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        inputs = as_parameters(micro_batch.inputs, model)
        labels = micro_batch.labels.to(inputs.device, non_blocking=True)
        with autocast(inputs.device, rule.precision):
            logits = model(inputs)
        each = nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            labels,
            reduction="none",
            label_smoothing=rule.label_smoothing,
        )
        return Losses(each, (logits.detach().argmax(1) == labels).sum())

    return forward


def as_parameters(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return inputs on the device of a model's parameters, and of the type of `input_type`."""
    return inputs.to(next(model.parameters()).device, input_type(model), non_blocking=True)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Torch's autocast to a type by name; nothing for float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
