"""Check by a few trial passes that the gradients of a network can be summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hvd_batchgrow.data.tensor_tree import Tree, num_rows
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.state.forward_state import trial_loss
from hvd_batchgrow.nn.state.saved_state import SavedState
from hvd_batchgrow.nn.state.side_effect_free import alike, dry_run, kept_generators

_FACTORS = (2.0**16, 2.0)
"""Factors on the loss: the large one reveals a hook that clips; 16-bit types may overflow and need the small one."""

Gradients = dict[str, Tensor | None]


def gradient_fault(model: nn.Module, example: Tree) -> str | None:
    """Check that gradients are dense, add up over two backward passes, and are proportional to the loss.

    An update sums losses over micro-batches and ranks, and divides once by the batch size after the last backward.
    That is the gradient of the mean loss only if every backward adds to `grad`, and is linear.

    Args:
        model: maps samples to logits; is not changed.
        example: 4 samples, not all equal.

    Returns:
        The fault and its remedy; None without a fault, or if random numbers make the passes differ.
    """
    with dry_run(model, num_rows(example), training=True, gradients=True, num_ghost_batches=2) as before:
        once = _gradients(model, example, before)
        if sparse := [name for name, gradient in once.items() if gradient is not None and _is_sparse(gradient)]:
            return f"the gradient of {listed(sparse)} is sparse; build its layer with sparse=False"
        if _differing(once, _gradients(model, example, before), 1.0):
            return None
        if names := _differing(once, _gradients(model, example, before, num_micro_batches=2), 2.0):
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
    model: nn.Module, example: Tree, before: SavedState, factor: float = 1.0, num_micro_batches: int = 1
) -> Gradients:
    """Return the gradients of the loss times a factor, summed over equal passes with equal random numbers."""
    for parameter in model.parameters():
        parameter.grad = None
    for _ in range(num_micro_batches):
        before.restore(attributes=False)
        with kept_generators():
            (trial_loss(model, example) * factor).backward()
        for norm in ghost_norms(model):
            norm.forget()
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def _differing(once: Gradients, others: Gradients, factor: float) -> list[str]:
    """Return the names of the gradients that are not `factor` times as large as before."""
    return [name for name, gradient in once.items() if not _is_multiple(gradient, others[name], factor)]


def _is_multiple(gradient: Tensor | None, other: Tensor | None, factor: float) -> bool:
    if gradient is None or other is None:
        return gradient is other
    return alike(gradient.double() * factor, other.double())


def _is_sparse(gradient: Tensor) -> bool:
    return gradient.layout != torch.strided


def _is_finite(gradients: Iterable[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
