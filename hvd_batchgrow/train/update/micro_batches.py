"""Combine the ghost batches of a reader into the micro-batches of an update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.data.order.order_digest import digest
from hvd_batchgrow.data.order.stream import ghost_batches_left
from hvd_batchgrow.data.pipeline.reader import GhostBatches, GhostBatchStream
from hvd_batchgrow.data.tensor_tree import join_rows, tensors_in
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.keyed_random import sample_keys
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.update.forward import MicroBatch


def read_micro_batches(
    ghost_batches: GhostBatchStream,
    passes: Iterable[tuple[int, ...]],
    keyed_by: tuple[int, int] | None,
    at: Callable[[str], None],
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of an update.

    Args:
        ghost_batches: of this rank, from the first one of the update on.
        passes: for each micro-batch, the slots of its ghost batches in the update; see `micro_batches_of_rank`.
        keyed_by: seed and N, if samples need keys for dropout.
        at: called with the name of each stage that this rank enters.
    """
    for slots in passes:
        at("reading samples")
        taken = ghost_batches.take(len(slots))
        at("computing gradients")
        yield join_ghost_batches(taken, slots, keyed_by)


def ghost_batches_per_micro_batch(plan: Plan, index: int, ranks: int) -> int:
    """Return how many ghost batches a rank reads as one batch from a ghost batch on: those up to the end of a pass.

    The reader calls it some batches before they are trained on. If the batch grows meanwhile, the batches in flight
    are cut or joined, and those after them end where passes do again.

    Args:
        plan: as it is known now.
        index: the ghost batch of the stream, with index mod R = rank.
        ranks: R.
    """
    schedule, size = plan.schedule, plan.ghost_batch
    phase = schedule.index_at(min(index * size, schedule.end_samples - 1))
    first, batch = schedule.phases[phase].start_samples // size, schedule.phases[phase].global_batch // size
    first += (index - first) // batch * batch
    return ghost_batches_left(index, first, batch, plan.layouts[phase].micro_batch // size, ranks)


def join_ghost_batches(
    ghost_batches: Sequence[GhostBatches], slots: tuple[int, ...], keyed_by: tuple[int, int] | None = None
) -> MicroBatch:
    """Join ghost batches into one micro-batch.

    Args:
        ghost_batches: ghost batches of the reader, in the order of the stream.
        slots: index of each ghost batch in the update.
        keyed_by: seed and N, if samples need keys for dropout.
    """
    stream_index, ids = (np.concatenate([getattr(g, part) for g in ghost_batches]) for part in ("stream_index", "ids"))
    return MicroBatch(
        join_rows([g.inputs for g in ghost_batches]),
        join_rows([g.targets for g in ghost_batches]),
        slots,
        digest(stream_index, ids),
        [
            pair
            for g in ghost_batches
            for pair in zip(*(part[g.replaced].tolist() for part in (g.stream_index, g.ids)), strict=True)
        ],
        sample_keys(keyed_by[0], stream_index // keyed_by[1], ids) if keyed_by else None,
    )


def gather_replaced(mine: Sequence[tuple[int, int]], ranks: Ranks) -> tuple[tuple[int, int], ...]:
    """Return the pairs of all ranks in order; all ranks call it."""
    most = int(ranks.all_gather([len(mine)], "replaced.counts").max())
    padded = [number for pair in mine for number in pair] + [-1, -1] * (most - len(mine))
    pairs = ranks.all_gather(padded, "replaced").view(-1, 2).tolist()
    return tuple(sorted((index, id_) for index, id_ in pairs if id_ >= 0))


def repeatable(
    micro_batches: Iterator[MicroBatch],
) -> tuple[Iterator[MicroBatch], Callable[[], Iterator[MicroBatch]]]:
    """Return the micro-batches, and a function that returns those that have been read again.

    The function raises RunError if a tensor of a micro-batch has been changed in the meantime by torch.
    """
    kept: list[tuple[MicroBatch, list[int]]] = []

    def read() -> Iterator[MicroBatch]:
        for micro_batch in micro_batches:
            kept.append((micro_batch, _versions(micro_batch)))
            yield micro_batch

    def read_again() -> Iterator[MicroBatch]:
        for index, (micro_batch, versions) in enumerate(kept):
            if _versions(micro_batch) != versions:
                raise RunError(
                    f"an exact update must be repeated, but the tensors of its micro-batch {index} have been changed "
                    "since it was read: yield new tensors, or pass again= (docs/library.md)"
                )
            yield micro_batch

    return read(), read_again


def _versions(micro_batch: MicroBatch) -> list[int]:
    """Return torch's counters of changes of its tensors."""
    trees = [tree for tree in (micro_batch.inputs, micro_batch.targets) if tree is not None]
    return [tensor._version for tensor in tensors_in(trees)]
