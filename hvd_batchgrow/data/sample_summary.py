"""What ranks compare to notice that a source has returned other samples on one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, Datasets
from hvd_batchgrow.data.samples.reproducible import ids_to_compare
from hvd_batchgrow.data.tensor_tree import tensors_in

_TOLERANCE = 1e-3
"""Largest relative difference of sums that is attributed to rounding: a user's transform may round in another way on
another machine."""

Summary = dict[str, list[Any]]


def sample_summary(source: Datasets) -> Summary:
    """Return plain values that differ if another source has other samples: a few of each set are read, spread over it.

    Bytes and whole numbers are summarized by a SHA-256, other numbers by their sum and the sum of their magnitudes.
    """
    sets = {"training": source.train, "validation": source.validation, "test": source.test}
    found: Summary = {}
    for name, samples in sets.items():
        if samples is None:
            continue
        found[f"the number of {name} samples"] = [len(samples)]
        if isinstance(samples.targets, np.ndarray):
            found[f"the {name} targets"] = [_summarized(samples.targets)]
        with suppress(BadSample):  # it is reported when it is needed
            found[f"the {name} samples"] = [_summarized(part) for part in _arrays(samples)]
    return found


def differences(ours: Summary, theirs: Summary) -> list[str]:
    """Return what differs between two summaries, for messages."""
    return [key for key in {**ours, **theirs} if not _alike(ours.get(key), theirs.get(key))]


def _arrays(samples: Dataset) -> Iterator[NDArray[Any]]:
    fetched = samples.fetch(ids_to_compare(len(samples)))
    batches = [tensor.numpy() for tensor in tensors_in(fetched)] if samples.kind == "samples" else [fetched]
    yield from (np.asarray(sample) for batch in batches for sample in batch)


def _summarized(values: NDArray[Any]) -> str | list[float]:
    if values.dtype.kind != "f":
        return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    wide = values.astype(np.float64)
    return [float(np.nansum(wide)), float(np.nansum(np.abs(wide)))]


def _alike(ours: Any, theirs: Any) -> bool:
    if not (isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs)):
        return bool(ours == theirs)
    if len(ours) == 2 and isinstance(ours[0], float):
        scale = max(ours[1], theirs[1])
        return all(a == b or abs(a - b) <= _TOLERANCE * scale for a, b in zip(ours, theirs, strict=True))
    return all(map(_alike, ours, theirs))
