"""Find parameters whose gradient depends on how a batch is divided, although the outputs do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvd_batchgrow.data.datasets.example import InputForm
from hvd_batchgrow.data.tensor_tree import Tree, num_rows, take_rows
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.keyed_random import keyed_modules, set_sample_keys
from hvd_batchgrow.nn.state.saved_state import SavedState
from hvd_batchgrow.nn.state.side_effect_free import cloned, dry_run, kept_generators, tensors_of, trial_samples

_NUM_SAMPLES = 4
_WHOLE, _HALVES = (slice(0, 4),), (slice(0, 2), slice(2, 4))

_SHARE = 0.1
"""Share of the network's largest gradient that counts as part of each tensor's size: a gradient that is 0 but for
rounding, such as that of a bias before an instance norm, is too small to be compared with itself."""


def gradient_hazards(model: nn.Module, form: InputForm, row_outputs: Sequence[int], tolerance: float) -> list[str]:
    """Return a line that names the parameters whose gradient over a batch is not the sum of those over its halves.

    The ghost norms use their running statistics: normalizing a few samples would amplify rounding.

    Args:
        model: its outputs for a sample do not depend on the rest of the batch; is not changed.
        form: shape of one input sample, (C, H, W) or (features,), or real samples.
        row_outputs: indices of those tensors in the network's output that have a row for each sample.
        tolerance: relative difference that rounding may cause.

    Returns:
        At most one line; empty if no such parameter was found.
    """
    if not row_outputs or not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    example = trial_samples(model, _NUM_SAMPLES, form)
    with dry_run(model, _NUM_SAMPLES, training=True, gradients=True) as before:
        for norm in ghost_norms(model):
            norm.training = False
        whole = _gradients(model, example, _WHOLE, row_outputs, before)
        halves = _gradients(model, example, _HALVES, row_outputs, before)
    largest = max(map(_size, whole.values()))
    names = [
        name
        for name, gradient in whole.items()
        if _size(gradient - halves[name]) > tolerance * (_size(gradient) + _SHARE * largest)
    ]
    return [f"{listed(names)}: the gradient over a batch is not the sum over its samples"] if names else []


def _gradients(
    model: nn.Module, example: Tree, parts: Sequence[slice], row_outputs: Sequence[int], before: SavedState
) -> dict[str, Tensor]:
    """Return the gradients, summed over one backward pass for each part of the samples."""
    for parameter in model.parameters():
        parameter.grad = None
    for rows in parts:
        before.restore(attributes=False)
        set_sample_keys(keyed_modules(model), torch.arange(num_rows(example))[rows])
        with kept_generators():
            outputs = list(tensors_of(model(cloned(take_rows(example, rows)))))
            losses = [nn.functional.softplus(outputs[index].float()).sum() for index in row_outputs]
            loss = torch.stack(losses).sum()
            if loss.requires_grad:
                loss.backward()
    return {
        name: torch.zeros((), dtype=torch.float64) if p.grad is None else p.grad.detach().to_dense().double()
        for name, p in model.named_parameters()
    }


def _size(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0
