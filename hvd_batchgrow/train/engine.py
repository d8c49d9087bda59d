"""One update: the sum of per-sample losses over B samples, however they are cut, divided by B once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.consumed import from_halves, to_halves
from hvd_batchgrow.nn.ghost_batch_norm import ghost_norms
from hvd_batchgrow.optim.build import set_hyperparameters
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.exact import join, split
from hvd_batchgrow.train.gradients import GradientBuckets

_NUM_TALLIES = 6
"""Loss, correct answers, stop votes, replaced samples, and the digest of all samples in two halves."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward on one rank."""

    inputs: Tensor
    """(k·γ, C, H, W) images, or (k·γ, features)."""
    labels: Tensor
    """(k·γ,)."""
    positions: tuple[int, ...]
    """Place of each of its k groups among the update's groups, 0 … B/γ - 1."""
    digest: int = 0
    """`consumed.digest` of its samples."""
    num_replaced: int = 0
    """How many of them stand in for bad ones."""


@dataclass(frozen=True)
class UpdateResult:
    """What one update was like, over all its samples on all ranks."""

    loss_sum: float
    """Sum of the per-sample losses, under the weights before the update."""
    num_correct: int
    stop_votes: int
    """Ranks that want to stop; the same number on every rank."""
    seconds: float
    """Wall time of the whole update on this rank."""
    data_wait_s: float
    """Of these, waiting for micro-batches."""
    reduce_wait_s: float
    """Of these, waiting for sums that the last backward did not hide."""
    digest: int
    """`consumed.digest` of all its samples, on all ranks."""
    num_replaced: int
    """Samples that stood in for bad ones, on all ranks."""


class UpdateEngine:
    """Computes updates of a model; the same ones under every layout, up to rounding.

    Args:
        model: maps images to logits.
        optimizer: holds the model's parameters; its `zero_grad` must not be used.
        ranks: the processes that share an update.
        rescale_momentum: see `set_hyperparameters`.
        exact: sum gradients and ghost statistics so that no layout changes a bit of them; a
            micro-batch must then be one group, and threads and kernels the same everywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        rescale_momentum: bool = False,
        exact: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.rescale_momentum = rescale_momentum
        self.device = next(model.parameters()).device
        self.norms = list(ghost_norms(model))
        for norm in self.norms:
            norm.deferred = True
        self.exact = exact
        self.buckets = GradientBuckets([p for p in model.parameters() if p.requires_grad], ranks, exact=exact)

    def update(
        self,
        micro_batches: Iterator[MicroBatch],
        num_passes: int,
        phase: Phase,
        num_groups: int,
        *,
        stop: bool = False,
    ) -> UpdateResult:
        """Do one update.

        Args:
            micro_batches: yields this rank's share; ranks may hold unequal shares.
            num_passes: how many micro-batches to take, >= 1.
            phase: gives B, the learning rate and the momentum.
            num_groups: groups of the whole update, B/γ.
            stop: whether this rank wants the job to stop; rides along with the sums.
        """
        start = time.perf_counter()
        self.model.train()
        self.buckets.zero()
        tally = torch.zeros(_NUM_TALLIES, dtype=torch.float64, device=self.device)
        tally[2] = stop
        positions: list[int] = []
        digest = num_replaced = 0
        data_wait_s = 0.0
        for index in range(num_passes):
            begin = time.perf_counter()
            micro_batch = next(micro_batches)
            data_wait_s += time.perf_counter() - begin
            positions += micro_batch.positions
            digest, num_replaced = digest + micro_batch.digest, num_replaced + micro_batch.num_replaced
            loss = self._forward(micro_batch, tally)
            if index == num_passes - 1:
                # All but the gradients is known now: its sum overlaps the last backward too.
                tally[3:] = torch.tensor([num_replaced, *to_halves(digest % 2**64)], dtype=torch.float64)
                totals = self._totals(tally, positions, num_groups)
                handle = self.ranks.start_sum(totals, "totals")
                self.buckets.start_when_ready()
            loss.backward()
            self.buckets.end_pass()
        reduce_wait_s = self.buckets.wait()
        self.ranks.wait(handle)
        self.buckets.divide(phase.global_batch)
        set_hyperparameters(self.optimizer, phase, rescale_momentum=self.rescale_momentum)
        self.optimizer.step()
        self._commit(totals[_NUM_TALLIES:], num_groups)
        loss_sum, num_correct, stop_votes, replaced, *halves = totals[:_NUM_TALLIES].tolist()
        return UpdateResult(
            loss_sum=loss_sum,
            num_correct=int(num_correct),
            stop_votes=int(stop_votes),
            seconds=time.perf_counter() - start,
            data_wait_s=data_wait_s,
            reduce_wait_s=reduce_wait_s,
            digest=from_halves(*halves),
            num_replaced=int(replaced),
        )

    def _forward(self, micro_batch: MicroBatch, tally: Tensor) -> Tensor:
        labels = micro_batch.labels.to(self.device, non_blocking=True)
        logits = self.model(as_parameters(micro_batch.inputs, self.model))
        loss: Tensor = nn.functional.cross_entropy(logits, labels, reduction="sum")
        tally[0] += loss.detach()
        tally[1] += (logits.detach().argmax(1) == labels).sum()
        return loss

    def _totals(self, tally: Tensor, positions: list[int], num_groups: int) -> Tensor:
        """float64 (6 + Σ 2C): the tallies, then what each ghost norm has to add.

        Exact sums have two parts, so that there are 4C numbers for a norm.
        """
        contributions = [norm.take_contributions(positions, num_groups) for norm in self.norms]
        sums = [split(c).sum(1) if self.exact else c.sum(0, keepdim=True) for c in contributions]
        return torch.cat([tally, *(part.reshape(-1) for part in sums)])

    def _commit(self, statistics: Tensor, num_groups: int) -> None:
        sizes = [2 * norm.num_features * (2 if self.exact else 1) for norm in self.norms]
        for norm, part in zip(self.norms, statistics.split(sizes), strict=True):
            parts = part.reshape(-1, 2, norm.num_features)
            norm.commit(join(parts) if self.exact else parts[0], num_groups)


def as_parameters(inputs: Tensor, model: nn.Module) -> Tensor:
    """Inputs on the device and of the type of a model's parameters."""
    parameter = next(model.parameters())
    return inputs.to(parameter.device, parameter.dtype, non_blocking=True)
