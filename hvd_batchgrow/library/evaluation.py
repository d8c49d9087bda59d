"""Evaluation over all ranks in a custom training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.modes import kept_modes
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.tasks.checked_losses import metrics_fault

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)


def split_batches(num_samples: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[list[int]]:
    """Return the sample ids of this rank's batches of an evaluation, for `DataLoader(dataset, batch_sampler=…)`.

    All ranks together have each sample exactly once: batch k belongs to rank k mod R, none is padded, and the last one
    may be smaller. If there are fewer batches than ranks, the list of some ranks is empty.

    Args:
        num_samples: of the dataset.
        batch_size: samples per batch, >= 1.
        rank: this rank.
        num_ranks: R.

    Raises:
        ValueError: the batch size is below 1, or there is no such rank.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank = {rank} must be in 0 … {num_ranks - 1}")
    starts = range(rank * batch_size, num_samples, num_ranks * batch_size)
    return [list(range(start, min(start + batch_size, num_samples))) for start in starts]


def evaluate(
    network: N,
    batches: Iterable[T],
    measure: Callable[[N, T], Mapping[str, tuple[Tensor | float, float]]],
    ranks: Ranks,
) -> dict[str, float]:
    """Return means over the batches of all ranks, equal on all ranks. All ranks call it together.

    Sums are computed in float64. Meanwhile the network is in evaluation mode and computes no gradients.

    Args:
        network: passed to `measure`; afterwards its modules have their previous modes.
        batches: of this rank, such as a DataLoader with `split_batches`.
        measure: returns, for each quantity, its sum over the samples of a batch and what to divide the total by, such
            as the number of samples; the same quantities for each batch.
        ranks: of `connect`.

    Returns:
        total sum divided by total count of each quantity; nan if the count is 0.

    Raises:
        ValueError: no rank has a batch, two batches have different quantities, or `measure` returned something else
            than a sum and a count of each.
    """
    sums: dict[str, Tensor] = {}
    with kept_modes(network), torch.no_grad():
        network.eval()
        for batch in batches:
            measured = measure(network, batch)
            if fault := metrics_fault(measured):
                raise ValueError(f"measure {fault}")
            if sums and {*measured} != {*sums}:
                raise ValueError(f"measure returned {sorted(measured)} for a batch, and {sorted(sums)} for another")
            for name, (total, count) in measured.items():
                pair = torch.stack([torch.as_tensor(value).to("cpu", torch.float64) for value in (total, count)])
                sums[name] = sums[name] + pair if name in sums else pair
    names = _agreed_names(sorted(sums), ranks)
    nothing = torch.zeros(2, dtype=torch.float64)
    totals = ranks.all_reduce(torch.stack([sums.get(name, nothing) for name in names]), "evaluate.sums").tolist()
    return {name: total / count if count else float("nan") for name, (total, count) in zip(names, totals, strict=True)}


def _agreed_names(names: list[str], ranks: Ranks) -> list[str]:
    """Return the quantities of all ranks that have batches."""
    found = [json.loads(text) for text in ranks.all_gather_bytes(dump_json(names).encode(), "evaluate.names")]
    different = {tuple(names) for names in found if names}
    if not different:
        raise ValueError("nothing to evaluate: no rank has a batch")
    if len(different) > 1:
        raise ValueError(f"ranks measured different quantities: {' and '.join(map(str, sorted(different)))}")
    return list(different.pop())
