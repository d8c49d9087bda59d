"""What an update sums over its micro-batches and ranks besides gradients: losses, metrics, counts, norm statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.data.order.order_digest import from_halves, to_halves
from hvd_batchgrow.data.order.splitmix import mix
from hvd_batchgrow.nn.ghost.norm_group import NormGroup
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.exact_sums import join_unchecked, largest, split
from hvd_batchgrow.train.update.forward import MicroBatch

_WEIGHT_UNIT = 2.0**-24
"""In exact mode weights are rounded to multiples of this. Their sum is then exact in any order, up to 2²⁹."""


@dataclass
class Share:
    """Sums over this rank's micro-batches of an update."""

    stop: bool
    exact: bool
    """Whether weights and statistics are summed without rounding."""
    slots: list[int] = field(default_factory=list)
    losses: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """For each micro-batch, the slots of its ghost batches and the sum of its losses, on the device."""
    weights: list[Tensor | float] = field(default_factory=list)
    """For each micro-batch, the sum of the weights of its samples."""
    metrics: list[dict[str, tuple[Tensor | float, Tensor | float]]] = field(default_factory=list)
    """For each micro-batch, its `Losses.metrics`."""
    digest: int = 0
    replaced: list[tuple[int, int]] = field(default_factory=list)

    def add(self, micro_batch: MicroBatch, losses: Losses) -> tuple[Tensor, Tensor | float]:
        """Add a micro-batch; return the sum of its losses, for the backward pass, and of its weights.

        Raises:
            ValueError: its metrics do not have the names of the micro-batches before it.
        """
        loss, weight = losses.each.sum(), self._weight_of(losses)
        if self.metrics and list(losses.metrics) != list(self.metrics[0]):
            raise ValueError(
                f"forward returned the metrics {list(losses.metrics)} for one micro-batch and {list(self.metrics[0])} "
                "for another; all of them need the same metrics in the same order"
            )
        self.slots += micro_batch.slots
        self.losses.append((micro_batch.slots, loss.detach()))
        self.weights.append(weight)
        self.metrics.append(dict(losses.metrics))
        self.digest += micro_batch.digest
        self.replaced += micro_batch.replaced
        return loss, weight

    def _weight_of(self, losses: Losses) -> Tensor | float:
        """Return the sum of the weights of a micro-batch's samples; without weights, their number."""
        if losses.weights is None:
            return float(len(losses.each))
        weights = losses.weights.detach().double()
        return (weights / _WEIGHT_UNIT).round().sum() * _WEIGHT_UNIT if self.exact else weights.sum()

    def numbers(self) -> list[list[Tensor | float]]:
        """Return the numbers to sum, each as its parts: those on the device, and those that the host knows.

        Loss, weight, stop requests, replaced samples, the digest in two halves, and sum and count of each metric.
        """
        known = (float(self.stop), float(len(self.replaced)), *to_halves(self.digest % 2**64))
        numbers: list[list[Tensor | float]] = [[loss for _, loss in self.losses], self.weights]
        numbers += [[number] for number in known]
        return numbers + [[of_pass[name][k] for of_pass in self.metrics] for name in self.metrics[0] for k in (0, 1)]


@dataclass(frozen=True)
class Totals:
    """The totals of an update over all ranks, as the host reads them."""

    loss_sum: float
    weight: float
    num_stop_requests: float
    num_replaced: float
    digest: int
    metrics: dict[str, tuple[float, float]]
    """Sum and count."""


class SharedTotals:
    """The totals of an update on their way over the ranks, and the contributions of the ghost norms with them.

    Args:
        share: of this rank.
        num_ghost_batches: number of ghost batches of the whole update.
        norm_groups: the norms whose statistics are summed.
        device: of the sums.

    Raises:
        ValueError: a slot is outside of the update.
    """

    def __init__(
        self, share: Share, num_ghost_batches: int, norm_groups: Sequence[NormGroup], device: torch.device
    ) -> None:
        outside = [slot for slot in share.slots if not 0 <= slot < num_ghost_batches]
        if outside:
            raise ValueError(
                f"slots {outside[:8]} must be in 0 … {num_ghost_batches - 1}: "
                f"the update has {num_ghost_batches} ghost batches"
            )
        self._names, self._norm_groups, self._exact = list(share.metrics[0]), norm_groups, share.exact
        self._slots, self._num_ghost_batches = list(share.slots), num_ghost_batches
        numbers = share.numbers()
        known = [sum(part for part in parts if not isinstance(part, Tensor)) for parts in numbers]
        known += [len(share.slots), *to_halves(_fingerprint(np.array(share.slots)))]
        weights = [group.norms[0].weights(share.slots, num_ghost_batches) for group in norm_groups]
        # What the host knows crosses to the device in one copy.
        host = torch.tensor([*known, *itertools.chain(*weights)], dtype=torch.float64)
        self._sizes = [len(numbers), 3]
        summed, rest = to_device(host, device).tensor_split([len(known)])
        for place, parts in enumerate(numbers):
            for part in parts:
                if isinstance(part, Tensor):
                    summed[place].add_(part)
        num_slots = len(share.slots)
        statistics: list[Tensor] = []
        for group, of_group in zip(norm_groups, rest.split(num_slots) if norm_groups else (), strict=True):
            contributions = of_group[:, None, None] * group.take_statistics(num_slots)
            statistics += _summed(contributions, group.sizes, exact=share.exact)
        self.vector = torch.cat([summed, *statistics])
        """float64 (9 + 2M + Σ 2C), to all-reduce; neither the ranks nor the batch change its size. Exact sums have two
        parts, each with a largest value: 4 (C+1) numbers per norm."""

    def statistics(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the contributions (2, ΣC) of each group of norms, and the largest values of their exact sums."""
        sums = self.vector[sum(self._sizes) :]
        if not self._exact:
            sizes = [2 * sum(group.sizes) for group in self._norm_groups]
            return [part.view(2, -1) for part in sums.split(sizes)], []
        joined, bounds, start = [], list[Tensor](), 0
        for group in self._norm_groups:
            parts = []
            for size in group.sizes:
                part = sums[start : start + 4 * (size + 1)].view(2, 2, -1)
                parts.append(join_unchecked(part))
                bounds.append(largest(part))
                start += 4 * (size + 1)
            joined.append(torch.cat(parts, dim=1))
        return joined, bounds

    def read(self, others: Sequence[Tensor], ranks: Ranks) -> tuple[Totals, list[float]]:
        """Wait for the device; return the totals, and the values of other tensors (), which are read with them.

        All ranks call it together, after the all-reduce of the vector.

        Raises:
            ValueError: a ghost batch was not processed once. All ranks have the same counts, so they raise together.
        """
        numbers = self.vector[: sum(self._sizes)]
        read = iter(torch.cat([numbers, *(value.view(1) for value in others)]).tolist())
        tallies, served = (list(itertools.islice(read, size)) for size in self._sizes)
        self._check_served(int(served[0]), from_halves(*served[1:]), ranks)
        loss_sum, weight, num_requests, num_replaced, first, second, *parts = tallies
        metrics = dict(zip(self._names, zip(parts[::2], parts[1::2], strict=True), strict=True))
        totals = Totals(loss_sum, weight, num_requests, num_replaced, from_halves(first, second), metrics)
        return totals, list(read)

    def _check_served(self, count: int, fingerprint: int, ranks: Ranks) -> None:
        """Check that each ghost batch was processed once; all ranks have the same sums.

        A count and a fingerprint take the same few bytes for any batch. Other slots have the same ones with a
        probability of 2⁻⁶⁴. Only if they are wrong do the ranks all-reduce a count per ghost batch.
        """
        if (count, fingerprint) == (self._num_ghost_batches, _fingerprint_of_all(self._num_ghost_batches)):
            return
        counts = torch.bincount(torch.tensor(self._slots, dtype=torch.int64), minlength=self._num_ghost_batches)
        each = ranks.all_reduce(counts, "ghost batches").tolist()
        wrong = [slot for slot, count in enumerate(each) if count != 1]
        found = ", ".join(f"ghost batch {slot}: {each[slot]} times" for slot in wrong[:8])
        raise ValueError(
            f"each of the update's {len(each)} ghost batches must be processed exactly once, but {len(wrong)} were "
            f"not: {found}{', …' if wrong[8:] else ''}"
        )


def _summed(contributions: Tensor, sizes: Sequence[int], *, exact: bool) -> list[Tensor]:
    """Sum the contributions (k, 2, ΣC) of this rank's ghost batches, flat; in exact mode as parts, norm by norm."""
    if not exact:
        return [contributions.sum(0).reshape(-1)]
    return [split(part).sum(1).reshape(-1) for part in contributions.split(list(sizes), dim=2)]


@lru_cache(maxsize=256)
def _fingerprint_of_all(num_ghost_batches: int) -> int:
    return _fingerprint(np.arange(num_ghost_batches))


def _fingerprint(slots: NDArray[np.int64]) -> int:
    """Return the sum of a 64-bit hash of each slot, modulo 2⁶⁴."""
    return int(mix(slots.astype(np.uint64)).sum(dtype=np.uint64))
