"""Files are read ahead, in order, and by several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.data.datasets.dataset import BadSample, Ids
from hvd_batchgrow.data.pipeline.read_ahead import fetch_ahead


class Samples:
    """Each sample is its id; sample 13 is bad. The first ten reads wait for each other, as slow storage would."""

    def __init__(self, num_together: int = 1) -> None:
        self.together = threading.Barrier(num_together, timeout=60)
        self.num_read = 0
        self.lock = threading.Lock()

    def fetch(self, ids: Ids) -> list[Any]:
        with self.lock:
            self.num_read += 1
            waits = self.num_read <= self.together.parties
        if waits:
            self.together.wait()
        if 13 in ids:
            raise BadSample(13, "13.jpg", "is bad")
        return [int(k) for k in ids]


def batches(num: int, size: int = 8, start: int = 0) -> Iterator[Ids]:
    return (np.arange(start + k * size, start + (k + 1) * size) for k in range(num))


@pytest.mark.parametrize(("num", "size"), [(0, 8), (1, 1), (100, 8), (3, 500), (5, 3)])
def test_batches_come_in_order(num: int, size: int) -> None:
    found = list(fetch_ahead(Samples(), batches(num, size, start=100)))  # type: ignore[arg-type]
    assert found == [ids.tolist() for ids in batches(num, size, start=100)]


def test_several_files_are_read_at_the_same_time() -> None:
    # With fewer than ten threads, the barrier would break.
    assert next(fetch_ahead(Samples(num_together=10), batches(100, start=100))) == list(range(100, 108))  # type: ignore[arg-type]


def test_what_is_read_ahead_is_bounded() -> None:
    taken = 0

    def endless() -> Iterator[Ids]:
        nonlocal taken
        while True:
            taken += 1
            yield np.arange(100, 132)

    next(fetch_ahead(Samples(), endless()))  # type: ignore[arg-type]
    assert taken == 256 // 32 + 1


def test_a_bad_sample_is_reported_when_its_batch_is_due() -> None:
    found = fetch_ahead(Samples(), batches(3))  # type: ignore[arg-type]
    assert next(found) == list(range(8))
    with pytest.raises(BadSample, match=r"sample 13 \(13\.jpg\): is bad"):
        next(found)
