"""Collect the outcome of each sample of an evaluation from all ranks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.results.outcomes import Outcomes
from hvd_batchgrow.tasks.task import Losses


class OutcomeCollector:
    """Keeps the losses of the samples that this rank evaluates, on the device, in the order of evaluation."""

    def __init__(self) -> None:
        self._batches: list[Losses] = []
        self._ids: list[NDArray[np.int64]] = []

    def add(self, losses: Losses, ids: NDArray[np.int64]) -> None:
        """Add a batch with its sample ids, without waiting for the device."""
        correct = None if losses.correct is None else losses.correct.float()
        weights = None if losses.weights is None else losses.weights.float()
        self._batches.append(Losses(losses.each.float(), weights, correct=correct))
        self._ids.append(ids)

    def collect(self, num_samples: int, samples: int, ranks: Ranks) -> Outcomes:
        """Return the outcomes of all samples on every rank. All ranks call it together.

        One rank evaluates each sample, and the others contribute 0 to the all-reduce, so it is exact. A bad sample that
        was skipped has the loss NaN.

        Args:
            num_samples: size of the set.
            samples: sample counter of the run.
            ranks: of the evaluation.
        """
        num_correct = sum(batch.correct is not None for batch in self._batches)
        num_weights = sum(batch.weights is not None for batch in self._batches)
        counts = ranks.all_gather([len(self._batches), num_correct, num_weights], "outcome columns").sum(0).tolist()
        has_correct, has_weights = counts[1] == counts[0], counts[2] > 0
        table = torch.zeros(2 + has_correct + has_weights, num_samples)
        if self._batches:
            losses = torch.cat([batch.each for batch in self._batches])
            columns = [torch.ones_like(losses), losses]
            if has_correct:
                columns.append(torch.cat([batch.correct for batch in self._batches if batch.correct is not None]))
            if has_weights:
                ones = (torch.ones_like(b.each) if b.weights is None else b.weights for b in self._batches)
                columns.append(torch.cat([*ones]))
            table[:, torch.from_numpy(np.concatenate(self._ids))] = torch.stack(columns).cpu()
        evaluated, each, *rest = ranks.all_reduce(table, "outcomes").numpy()
        each[evaluated == 0] = np.nan
        correct = rest.pop(0) > 0 if has_correct else None
        return Outcomes(samples, each, correct, rest.pop(0) if has_weights else None)
