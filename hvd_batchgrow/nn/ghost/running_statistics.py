"""Running statistics of ghost norms, brought to the present weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, ghost_norms


@torch.no_grad()
def reestimate_running_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all ghost norms by plain averages under the present weights.

    The running mean becomes the mean of μᵢ over all ghost batches i of all batches, and the running
    variance the mean of their unbiased variances: that within ghost batches, by which training
    divides, without that between their means. Meanwhile the ghost norms work as in training, all
    other modules as in evaluation. A norm that no batch reaches is left as it is.

    Args:
        model: is called with each batch.
        batches: inputs, each of a multiple of γ samples.

    Raises:
        ValueError: no norm has seen a ghost batch, or an input has a broken one.

    Source: after PreciseBN, Wu & Johnson 2021 (arXiv 2105.07576), section 3, whose variance is that
    of all samples, with the variance between the means.
    """
    sums, counts = sum_statistics(model, batches, lambda statistics: statistics.sum(0))
    set_running_statistics(model, sums, counts)


@torch.no_grad()
def sum_statistics(
    model: nn.Module, batches: Iterable[Tensor], add: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What the ghost batches of some inputs have for statistics, added up; the model stays as it is.

    Args:
        model: is called with each batch, its ghost norms as in training, all else as in evaluation.
        batches: inputs, each of a multiple of γ samples; may be none.
        add: of the statistics (k, 2, C) of k ghost batches, mean and unbiased variance; what it gives for
            several inputs is added. k may be 0.

    Returns:
        for each ghost norm its sum; and the ghost batches that each has seen, float64 (norms,).
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
    """Make the running statistics of each ghost norm a sum (2, C) divided by its count; as they are where that is 0.

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
    modes = [(module, module.training) for module in model.modules()]
    deferred = [norm.deferred for norm in norms]
    model.eval()
    for norm in norms:
        norm.training = norm.deferred = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for norm, was_deferred in zip(norms, deferred, strict=True):
            norm.deferred = was_deferred
            norm.forget()  # of a batch that failed half-way
