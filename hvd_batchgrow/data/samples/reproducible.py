"""Check that a source returns the same samples again, whatever was drawn before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.messages.errors import RunError

NUM_DRAWN = 6
"""Samples of each set that are drawn twice."""

_REMEDY = (
    "inside the source, draw random numbers from the global generators of random, NumPy (numpy.random.…) or torch, or "
    "from generators seeded by them or passed to fetch: they are seeded for each sample. A generator that the source "
    "keeps depends on the samples before, and so on ranks, workers and resuming"
)


def ids_to_compare(num_samples: int) -> Ids:
    """Return the ids of a few samples, spread over a set."""
    return np.unique(np.linspace(0, num_samples - 1, NUM_DRAWN).astype(np.int64))


def check_reproducible(
    draw: Callable[[int], Any], ids: Sequence[int], same: Callable[[Any, Any], bool], locate: Callable[[int], str]
) -> None:
    """Draw samples one by one, then again in the opposite order, and compare them.

    Args:
        draw: returns a sample.
        ids: of the samples.
        same: returns whether two samples are bit-identical.
        locate: returns the location of a sample, for the message.

    Raises:
        RunError: a sample was not the same again.
    """
    first = {sample_id: draw(sample_id) for sample_id in ids}
    again = {sample_id: draw(sample_id) for sample_id in reversed(ids)}
    differing = [sample_id for sample_id in ids if not same(first[sample_id], again[sample_id])]
    if differing:
        count = f"{len(differing)} of {len(ids)} samples, drawn twice with equally seeded generators, differ"
        raise RunError(f"{locate(differing[0])}: {count}; {_REMEDY}")
