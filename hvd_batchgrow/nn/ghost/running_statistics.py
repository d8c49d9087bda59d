"""Re-estimate the running statistics of ghost norms for the current weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, ghost_norms
from hvd_batchgrow.nn.modes import kept_modes, modes_of


@torch.no_grad()
def reestimate_running_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all ghost norms by averages under the current weights.

    The running mean becomes the mean of μᵢ over all ghost batches i of all batches, and the running
    variance the mean of their unbiased variances. This is the variance within ghost batches, by which
    training normalizes, without the variance between their means. Meanwhile the ghost norms are in training
    mode, all other modules in evaluation mode. A norm that is frozen, that `model.train()` keeps in evaluation mode,
    or that no batch reaches, does not change.

    Args:
        model: is called with each batch.
        batches: inputs, each of a multiple of γ samples.

    Raises:
        ValueError: no batch reached any norm, or a batch is not a multiple of γ.

    Source: PreciseBN, Wu & Johnson 2021 (arXiv 2105.07576), section 3. Unlike here, its variance is that
    of all samples, which includes the variance between the means.
    """
    sums, counts = sum_statistics(model, batches, lambda statistics: statistics.sum(0))
    set_running_statistics(model, sums, counts)


@torch.no_grad()
def sum_statistics(
    model: nn.Module, batches: Iterable[Tensor], add: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Sum the statistics of the ghost batches of some inputs. The model is not changed.

    Args:
        model: is called with each batch, with its ghost norms in training mode, all else in evaluation mode.
        batches: inputs, each of a multiple of γ samples; may be empty.
        add: maps the statistics (k, 2, C) of k >= 0 ghost batches, mean and unbiased variance, to a summand.

    Returns:
        The sum for each ghost norm; and the number of ghost batches that reached each, float64 (norms,).
    """
    norms = list(ghost_norms(model))
    sums = [add(norm.take_statistics()[:0]) for norm in norms]
    counts = torch.zeros(len(norms), dtype=torch.float64)
    with _only_ghost_norms_training(model, norms):
        for batch in batches:
            model(batch)
            for index, norm in enumerate(norms):
                statistics = norm.take_statistics()
                sums[index] += add(statistics)
                counts[index] += len(statistics)
    return sums, counts


@torch.no_grad()
def set_running_statistics(model: nn.Module, sums: Sequence[Tensor], counts: Tensor) -> None:
    """Set the running statistics of each ghost norm to its sum (2, C) divided by its count, unless that is 0.

    Raises:
        ValueError: all counts are 0.
    """
    norms = list(ghost_norms(model))
    if not counts.any():
        raise ValueError(f"no batch has reached any of {len(norms)} ghost norms: there is nothing to average")
    for norm, total, count in zip(norms, sums, counts.tolist(), strict=True):
        if count:
            norm.running_mean.copy_(total[0] / count)
            norm.running_var.copy_(total[1] / count)


@contextmanager
def _only_ghost_norms_training(model: nn.Module, norms: Sequence[GhostBatchNorm]) -> Iterator[None]:
    deferred = [norm.deferred for norm in norms]
    try:
        with kept_modes(model):
            in_training = modes_of(model, training=True)
            model.eval()
            for norm in norms:
                norm.training, norm.deferred = in_training[norm], True
            yield
    finally:
        for norm, was_deferred in zip(norms, deferred, strict=True):
            norm.deferred = was_deferred
            norm.forget()  # the statistics of a batch that failed
