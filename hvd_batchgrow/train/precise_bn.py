"""Re-estimation of the running statistics by all ranks together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.ghost.running_statistics import set_running_statistics, sum_statistics
from hvd_batchgrow.train.update.exact import join, split


def reestimate_together(model: nn.Module, batches: Iterable[Tensor], ranks: Ranks, *, exact: bool) -> None:
    """Apply `reestimate_running_statistics` to the batches of all ranks, which may hold different numbers of batches.

    Args:
        model: the same on all ranks.
        batches: this rank's inputs, each of a multiple of γ samples; may be empty.
        ranks: all of them call this.
        exact: sum without rounding, so that all layouts give bit-identical statistics.

    Raises:
        ValueError: no rank has a batch, or the model has no ghost norm.
    """
    sums, counts = sum_statistics(model, batches, _parts if exact else _plain)
    flat = torch.cat([*(total.reshape(-1) for total in sums), counts.to(sums[0].device)])
    ranks.sum(flat, "running statistics")
    *summed, all_counts = flat.split([*(total.numel() for total in sums), len(counts)])
    shaped = [part.view_as(total) for part, total in zip(summed, sums, strict=True)]
    set_running_statistics(model, [join(part) if exact else part for part in shaped], all_counts)


def _plain(statistics: Tensor) -> Tensor:
    return statistics.sum(0)


def _parts(statistics: Tensor) -> Tensor:
    return split(statistics).sum(1)
