"""Read the files of the next ghost batches in threads, while the current one is decoded or trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hvd_batchgrow.data.datasets.dataset import Dataset, Ids

_THREADS = 16
"""Files that a rank reads at the same time. The threads wait for storage and use little of a core."""
_AT_ONCE = 4
"""Samples of one task of a thread, to amortize its overhead."""
_AHEAD = 256
"""Samples that are read ahead, at least; it bounds the memory."""


def fetch_ahead(samples: Dataset, batches: Iterator[Ids]) -> Iterator[list[Any]]:
    """Yield `samples.fetch` of each batch, in order; threads fetch the next ones meanwhile.

    Args:
        samples: encoded samples; threads fetch from them concurrently.
        batches: the ids of each batch.

    Raises:
        BadSample: when its batch is the next to yield.
    """
    waiting: deque[Sequence[Future[Any]]] = deque()
    pool = ThreadPoolExecutor(_THREADS, "read ahead")
    try:
        num_ahead = 0
        for ids in batches:
            parts = [ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE)]
            waiting.append([pool.submit(samples.fetch, part) for part in parts])
            num_ahead += len(ids)
            if num_ahead > _AHEAD and len(waiting) > 1:
                values = _values(waiting.popleft())
                num_ahead -= len(values)
                yield values
        while waiting:
            yield _values(waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _values(parts: Sequence[Future[Any]]) -> list[Any]:
    return [value for part in parts for value in part.result()]
