"""The forward pass of a network over a micro-batch: from its samples to their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.data.tensor_tree import device_of, moved, num_rows
from hvd_batchgrow.nn.parameters import network_inputs
from hvd_batchgrow.tasks.checked_losses import losses_of, metrics_fault, weights_fault
from hvd_batchgrow.tasks.task import Losses, Task


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
    """`order_digest.digest` of its samples."""
    replaced: Sequence[tuple[int, int]] = ()
    """(stream index, sample id) of each of its samples that replaced a bad one."""
    keys: Tensor | None = None
    """(k·γ,), `nn.keyed_random.sample_keys`; needed only if the network has keyed modules."""


Forward = Callable[[nn.Module, MicroBatch], Losses]


def forward_of(task: Task, precision: str) -> Forward:
    """Return a task's forward pass for training, which computes losses in float32 or a wider type.

    Args:
        task: gives the losses.
        precision: `update.precision`.
    """

    def forward(model: nn.Module, micro_batch: MicroBatch) -> Losses:
        inputs = network_inputs(micro_batch.inputs, model)
        device = device_of(inputs)
        targets = moved(micro_batch.targets, device)
        with autocast(device, precision):
            outputs = model(inputs)
        return losses_of(task, widened(outputs), targets, num_rows(inputs), training=True)

    return forward


def widened(outputs: Any) -> Any:
    """Return outputs with all floating-point tensors in float32 or, if they have one, a wider type.

    This includes tensors in tuples, lists, dicts and dataclasses, which keep their classes and attributes. All other
    objects are returned unchanged.
    """
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32)) if outputs.is_floating_point() else outputs
    parts = _parts(outputs)
    changed = {key: wide for key, part in parts.items() if (wide := widened(part)) is not part}
    return _with_parts(outputs, parts, changed) if changed else outputs


def _parts(outputs: Any) -> dict[Any, Any]:
    if isinstance(outputs, dict):
        return dict(outputs.items())
    if isinstance(outputs, (tuple, list)):
        return dict(enumerate(outputs))
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name, None) for field in fields(outputs)}
    return {}


def _with_parts(outputs: Any, parts: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    """Return a copy of outputs, some parts of which are other objects."""
    if isinstance(outputs, (tuple, list)):
        values = [*(parts | changed).values()]
        return type(outputs)(*values) if hasattr(outputs, "_fields") else type(outputs)(values)
    if isinstance(outputs, dict):  # not by copy(), which fails if attributes are looked up as keys
        found = type(outputs).__new__(type(outputs))
        getattr(found, "__dict__", {}).update(getattr(outputs, "__dict__", {}))
        for key, value in (parts | changed).items():
            found[key] = value
        return found
    found = copy(outputs)
    for name, value in changed.items():
        object.__setattr__(found, name, value)  # also if the dataclass is frozen
    return found


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return torch's autocast to a type given by name; for float32 and tf32, a context that does nothing."""
    if precision in {"float32", "tf32"}:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def check_losses(losses: Losses, num_ghost_batches: int, ghost_batch: int) -> None:
    """Check that there is one loss per sample of a micro-batch, one weight if there are weights, and valid metrics.

    A mean instead would give all micro-batches the same weight, whatever their size; and dividing by B is only
    correct for a sum of B losses.

    Args:
        losses: of the micro-batch.
        num_ghost_batches: its number of ghost batches.
        ghost_batch: γ.

    Raises:
        ValueError: it is not `Losses`, the losses or the weights have another shape, the weights have a gradient, or a
            metric is not a sum and a count.
    """
    if not isinstance(losses, Losses):
        raise ValueError(
            f"forward returned {type(losses).__name__}; it must return Losses(each), a loss of each sample"
        )
    size, shape = num_ghost_batches * ghost_batch, _shape_of(losses.each)
    if shape != (size,) or not num_ghost_batches:
        raise ValueError(
            f"forward returned losses of shape {shape} for a micro-batch of {num_ghost_batches} ghost batches "
            f"of {ghost_batch}; it must return the loss of each sample, ({size},): reduction='none'"
        )
    if losses.weights is not None and _shape_of(losses.weights) != (size,):
        raise ValueError(
            f"forward returned weights of shape {_shape_of(losses.weights)} for a micro-batch of {size} samples; "
            f"it must return the weight of each sample, ({size},)"
        )
    if fault := weights_fault(losses.weights) or metrics_fault(losses.metrics):
        raise ValueError(f"forward {fault}")


def _shape_of(values: Any) -> tuple[int, ...] | str:
    return tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
