"""The global sample stream: the order of samples, independent of ranks and machines."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.data.order.permutation import ROUNDS, Permutation
from hvd_batchgrow.data.order.philox import philox4x32

_ORDER_KEY = 1 << 63
"""Set in the keys of permutations and never in those of draws: seeds are below it."""
_USE_BITS = 16
"""Bits of a counter's last word that number the blocks of one use."""


class Stream:
    """An endless list of (epoch, sample id): one permutation of 0 … N-1 per epoch.

    Entry k is a pure function of (seed, k), where k counts samples from the start of the run: reading
    may begin anywhere at no cost, and only the keys of an epoch are kept.

    Args:
        num_samples: N, 1 … 2⁶⁰.
        seed: 0 <= seed < 2⁶³.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        # At most two epochs are in use at once: the ending and the beginning one.
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def at(self, stream_index: Ids) -> tuple[Ids, Ids]:
        """Return epoch and sample id of each entry, in any order, int64 of shape (n,)."""
        epochs, offsets = np.divmod(stream_index, self.num_samples)
        if not len(stream_index) or (epochs == epochs[0]).all():
            return epochs, self._permutation(int(epochs[0]))(offsets) if len(stream_index) else offsets
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._permutation(int(epoch))(offsets[here])
        return epochs, ids

    def ids(self, start: int, stop: int) -> Ids:
        """Return the sample ids of the stream indices start … stop-1, int64 of shape (stop - start,)."""
        return self.at(np.arange(start, stop, dtype=np.int64))[1]

    def _make_permutation(self, epoch: int) -> Permutation:
        return keyed_permutation(self.num_samples, self.seed, epoch)


def keyed_permutation(num_entries: int, seed: int, epoch: int, domain: int = 0) -> Permutation:
    """Return the permutation of 0 … N-1 that belongs to a seed and an epoch.

    Args:
        num_entries: N, 1 … 2⁶⁰.
        seed: 0 <= seed < 2⁶³.
        epoch: 0 <= epoch < 2⁶⁴.
        domain: 0 for the order of an epoch; each other use has its own number, below 2³².
    """
    counter = np.zeros((4, ROUNDS), dtype=np.uint64)
    counter[0], counter[1], counter[2], counter[3] = np.arange(ROUNDS), epoch & 0xFFFFFFFF, epoch >> 32, domain
    key = seed | _ORDER_KEY
    words = philox4x32(counter, (key & 0xFFFFFFFF, key >> 32)).T.reshape(-1, 2)
    return Permutation(num_entries, [int(low) | int(high) << 32 for low, high in words])


def sample_draws(seed: int, epochs: Ids, ids: Ids, num_draws: int, use: int = 0) -> NDArray[np.float64]:
    """Return uniform draws that depend only on seed, epoch, sample and use.

    They do not depend on rank, worker or batch, so a sample is augmented identically in every layout. Draws for
    different uses are independent, so that one augmentation does not change the draws of another.

    Args:
        seed: of the run.
        epochs: (n,) epoch of each sample.
        ids: (n,) sample ids.
        num_draws: per sample; below 2¹⁸.
        use: 0 for crops and mirrors; each other use has its own number, below 2¹⁵.

    Returns:
        float64 (n, num_draws) in [0, 1).
    """
    n = len(ids)
    blocks = ceil(num_draws / 4)
    low, high = ids.astype(np.uint64) & np.uint64(0xFFFFFFFF), ids.astype(np.uint64) >> np.uint64(32)
    counter = np.empty((4, blocks, n), dtype=np.uint64)
    counter[0], counter[1], counter[2] = low, high, epochs.astype(np.uint64)
    counter[3] = (np.arange(blocks, dtype=np.uint64) + np.uint64(use << _USE_BITS))[:, None]
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words.transpose(2, 1, 0).reshape(n, 4 * blocks)[:, :num_draws] / 2.0**32


def ghost_batches_of_rank(first_ghost_batch: int, num_ghost_batches: int, rank: int, ranks: int) -> range:
    """Return a rank's ghost batches k among `num_ghost_batches` from `first_ghost_batch` on: those with k mod R = rank.

    The rule does not depend on the batch, so prefetched ghost batches remain valid when the batch grows.
    """
    first = first_ghost_batch + (rank - first_ghost_batch) % ranks
    return range(first, first_ghost_batch + num_ghost_batches, ranks)


def micro_batches_of_rank(
    samples: int, global_batch: int, ghost_batch: int, micro_batch: int, rank: int, ranks: int
) -> list[tuple[int, ...]]:
    """Return the micro-batches of a rank in an update: for each, the indices of its ghost batches within the update.

    Args:
        samples: sample counter before the update, a multiple of γ.
        global_batch: B, a multiple of γ.
        ghost_batch: γ.
        micro_batch: its largest size, a multiple of γ; the last micro-batch may be smaller.
        rank: this rank.
        ranks: R.
    """
    first = samples // ghost_batch
    mine = [k - first for k in ghost_batches_of_rank(first, global_batch // ghost_batch, rank, ranks)]
    per_pass = micro_batch // ghost_batch
    return [tuple(mine[i : i + per_pass]) for i in range(0, len(mine), per_pass)]


def ghost_batches_left(index: int, first_ghost_batch: int, num_ghost_batches: int, per_pass: int, ranks: int) -> int:
    """Return how many of a rank's ghost batches, from one of them on, are in the same micro-batch of its rank.

    Args:
        index: the ghost batch; it decides the rank.
        first_ghost_batch: the first ghost batch of the update.
        num_ghost_batches: B/γ.
        per_pass: the most ghost batches of a micro-batch.
        ranks: R.

    Returns:
        1 … per_pass; 0 after the end of the update.
    """
    if index >= first_ghost_batch + num_ghost_batches:
        return 0
    mine = ghost_batches_of_rank(first_ghost_batch, num_ghost_batches, index % ranks, ranks)
    before = mine.index(index)
    return min(per_pass - before % per_pass, len(mine) - before)
