"""Combine the ghost batches of a reader into the micro-batches of an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.order.order_digest import digest
from hvd_batchgrow.data.pipeline.reader import GhostBatch
from hvd_batchgrow.nn.dropout import sample_keys
from hvd_batchgrow.train.update.forward import MicroBatch


def join_groups(
    groups: Sequence[GhostBatch], positions: tuple[int, ...], keyed_by: tuple[int, int] | None = None
) -> MicroBatch:
    """Join ghost batches into one micro-batch.

    Args:
        groups: ghost batches of the reader, in the order of the stream.
        positions: position of each ghost batch in the update.
        keyed_by: seed and N, if samples need keys for dropout.
    """
    entries, ids = (np.concatenate([getattr(group, part) for group in groups]) for part in ("entries", "ids"))
    return MicroBatch(
        _joined([group.inputs for group in groups]),
        _joined([group.labels for group in groups]),
        positions,
        digest(entries, ids),
        sum(int(group.replaced.sum()) for group in groups),
        sample_keys(keyed_by[0], entries // keyed_by[1], ids) if keyed_by else None,
    )


def inputs_of(batches: Iterable[GhostBatch], per_pass: int) -> Iterator[Tensor]:
    """Yield the inputs of `per_pass` ghost batches at a time."""
    groups = iter(batches)
    while taken := [batch.inputs for batch in islice(groups, per_pass)]:
        yield _joined(taken)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]


def gather_replaced(batches: Sequence[GhostBatch], ranks: Ranks) -> tuple[tuple[int, int], ...]:
    """Return (stream index, sample id) of all samples of an update that replaced bad ones; all ranks call it."""
    mine = [pair for b in batches for pair in zip(b.entries[b.replaced], b.ids[b.replaced], strict=True)]
    counts = torch.zeros(ranks.size, dtype=torch.int64)
    counts[ranks.rank] = len(mine)
    ends = ranks.sum(counts, "replaced.counts").cumsum(0)
    pairs = torch.zeros((int(ends[-1]), 2), dtype=torch.int64)
    pairs[int(ends[ranks.rank]) - len(mine) : int(ends[ranks.rank])] = torch.tensor(mine).reshape(-1, 2)
    return tuple(sorted((entry, id_) for entry, id_ in ranks.sum(pairs, "replaced").tolist()))
