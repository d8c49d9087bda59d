"""Advance the running statistics of many ghost norms together: a few operations for all of them, not for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm


class NormGroup:
    """Ghost norms with the same momentum, whose channels follow each other.

    Args:
        norms: at least one.
    """

    def __init__(self, norms: Sequence[GhostBatchNorm]) -> None:
        self.norms = norms
        self.momentum = norms[0].momentum
        self.sizes = [norm.num_features for norm in norms]

    def take_statistics(self, num_ghost_batches: int) -> Tensor:
        """Return mean and unbiased variance of each ghost batch since the last call, (num_ghost_batches, 2, ΣC).

        Raises:
            ValueError: a norm has processed another number of ghost batches.
        """
        pending = [norm.take_pending() for norm in self.norms]
        for passes in pending:
            if (count := sum(map(len, passes))) != num_ghost_batches:
                raise ValueError(
                    f"{count} ghost batches seen, {num_ghost_batches} expected: "
                    "does the model use a norm twice, or skip it?"
                )
        if len({tuple(map(len, passes)) for passes in pending}) > 1:
            pending = [[torch.cat(passes)] for passes in pending]
        parts = [_joined(of_pass, dim=2) for of_pass in zip(*pending, strict=True)]
        return _joined(parts, dim=0)

    def commit(self, contributions: Tensor, num_ghost_batches: int) -> None:
        """Advance the running statistics by one update of G ghost batches; see `GhostBatchNorm`.

        Args:
            contributions: float64 (2, ΣC), the weighted sum over all ghost batches of the update.
            num_ghost_batches: G.
        """
        running = [norm.running_mean for norm in self.norms] + [norm.running_var for norm in self.norms]
        kept = (1 - self.momentum) ** num_ghost_batches
        advanced = torch.cat(running)
        torch.add(contributions.reshape(-1), advanced, alpha=kept, out=advanced)  # in float64, then rounded
        torch._foreach_copy_(running, advanced.split(self.sizes * 2))


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(tuple(tensors), dim) if len(tensors) > 1 else tensors[0]


def group_norms(norms: Iterable[GhostBatchNorm]) -> list[NormGroup]:
    """Return the norms in training mode, grouped by momentum and type; others do not change their statistics."""
    groups: dict[tuple[float, torch.dtype], list[GhostBatchNorm]] = {}
    for norm in norms:
        if norm.training:
            groups.setdefault((norm.momentum, norm.running_mean.dtype), []).append(norm)
    return [NormGroup(members) for members in groups.values()]
