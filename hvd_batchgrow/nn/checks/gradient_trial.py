"""Whether the gradients of a network can be summed over micro-batches and ranks, found by a few trial passes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.checks.forward_trace import alike
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.state.forward_state import listed, trial_loss
from hvd_batchgrow.nn.state.saved_state import SavedState
from hvd_batchgrow.nn.state.side_effect_free import dry_run, kept_generators

_FACTORS = (2.0**16, 2.0)
"""Scales of the loss to try: a large one shows a hook that clips, a small one is left to types of 16 bits."""

Gradients = dict[str, Tensor | None]


def gradient_fault(model: nn.Module, example: Tensor) -> str | None:
    """Check that gradients are dense, add up over two backward passes, and are proportional to the loss.

    An update sums losses over micro-batches and ranks, and divides once by the batch size after the last backward.
    That is the gradient of the mean loss only if every backward adds to `grad`, and is linear.

    Args:
        model: maps samples to logits; stays as it is.
        example: 4 samples, not all alike.

    Returns:
        what is wrong and the remedy; None: nothing, or the passes cannot be repeated (random numbers).
    """
    with dry_run(model, len(example), training=True, gradients=True, num_groups=2) as before:
        once = _gradients(model, example, before)
        if sparse := [name for name, gradient in once.items() if gradient is not None and _is_sparse(gradient)]:
            return f"the gradient of {listed(sparse)} is sparse; build its layer with sparse=False"
        if _differing(once, _gradients(model, example, before), 1.0):
            return None
        if names := _differing(once, _gradients(model, example, before, num_passes=2), 2.0):
            return (
                f"the gradients of two backward passes do not add up in {listed(names)}: a hook or the forward pass "
                "changes or clears .grad; leave it to autograd, which adds to it"
            )
        for factor in _FACTORS:
            scaled = _gradients(model, example, before, factor)
            if not _is_finite(scaled.values()):
                continue
            if names := _differing(once, scaled, factor):
                return (
                    f"the gradient of {listed(names)} is not proportional to the loss: a hook, an autograd function or "
                    "a backward pass inside the forward pass clips it or adds to it. Losses are summed here, and their "
                    "gradient is divided by the batch size at the end; use update.clip_norm to clip"
                )
    return None


def _gradients(
    model: nn.Module, example: Tensor, before: SavedState, factor: float = 1.0, num_passes: int = 1
) -> Gradients:
    """Gradients of a loss times a factor after some equal passes; with its random numbers, the same each time."""
    for parameter in model.parameters():
        parameter.grad = None
    for _ in range(num_passes):
        before.restore(attributes=False)
        with kept_generators():
            (trial_loss(model, example) * factor).backward()
        for norm in ghost_norms(model):
            norm.forget()
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def _differing(once: Gradients, others: Gradients, factor: float) -> list[str]:
    """Names of the gradients that are not a factor times as large."""
    return [name for name, gradient in once.items() if not _is_multiple(gradient, others[name], factor)]


def _is_multiple(gradient: Tensor | None, other: Tensor | None, factor: float) -> bool:
    if gradient is None or other is None:
        return gradient is other
    return alike(gradient.double() * factor, other.double())


def _is_sparse(gradient: Tensor) -> bool:
    return gradient.layout != torch.strided


def _is_finite(gradients: Iterable[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
