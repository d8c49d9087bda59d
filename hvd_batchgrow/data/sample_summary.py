"""What ranks compare to notice that a source has returned other samples on one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, Datasets
from hvd_batchgrow.data.datasets.subset import resolve, whole_of
from hvd_batchgrow.data.samples.reproducible import ids_to_compare
from hvd_batchgrow.data.samples.sample_dataset import SampleDataset
from hvd_batchgrow.data.tensor_tree import tensors_in

_TOLERANCE = 1e-3
"""Largest relative difference of sums that is attributed to rounding: a user's transform may round in another way on
another machine."""
_LARGEST = 1e150
"""Numbers are limited to it, so that their sum is finite."""

_PART_BYTES = 1 << 26

Summary = dict[str, list[Any]]


def sample_summary(source: Datasets) -> Summary:
    """Return plain values that differ if another source has other samples: a few of each set are read, spread over it.

    Bytes and whole numbers are summarized by a SHA-256. Other numbers are summarized by the sum of the finite ones, the
    sum of their magnitudes, and a SHA-256 of which of them are finite.
    """
    sets = {"training": source.train, "validation": source.validation, "test": source.test}
    found: Summary = {}
    for name, samples in sets.items():
        if samples is None:
            continue
        found[f"the number of {name} samples"] = [len(samples)]
        if isinstance(whole_of(samples).targets, np.ndarray):
            found[f"the {name} targets"] = [_summarized(part) for part in _targets(samples)]
        with suppress(BadSample):  # it is reported when it is needed
            found[f"the {name} samples"] = [_summarized(part) for part in _arrays(samples)]
    return found


def differences(ours: Summary, theirs: Summary) -> list[str]:
    """Return what differs between two summaries, for messages."""
    return [key for key in {**ours, **theirs} if not _alike(ours.get(key), theirs.get(key))]


def _targets(samples: Dataset) -> Iterator[NDArray[Any]]:
    """Yield all targets in parts, because they may be an array on disk that is larger than the memory."""
    size = samples.targets[np.arange(1)].nbytes
    step = max(1, _PART_BYTES // max(1, size))
    for first in range(0, len(samples), step):
        yield samples.targets[np.arange(first, min(first + step, len(samples)))]


def _arrays(samples: Dataset) -> Iterator[NDArray[Any]]:
    """Yield each array of a few samples, of a torch Dataset also those of their targets."""
    ids = ids_to_compare(len(samples))
    whole, ids_in_whole = resolve(samples, ids)
    if isinstance(whole, SampleDataset):
        drawn = whole.draw(np.zeros_like(ids_in_whole), ids_in_whole)
        batches = [_as_array(tensor) for tensor in tensors_in([drawn.inputs, drawn.targets])]
    else:
        batches = [samples.fetch(ids)]
    yield from (np.asarray(sample) for batch in batches for sample in batch)


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's values; NumPy lacks some of torch's floating-point types."""
    return (tensor.double() if tensor.is_floating_point() else tensor).detach().numpy()


def _summarized(values: NDArray[Any]) -> str | list[Any]:
    if values.dtype.kind != "f":
        return _sha256(values)
    is_finite = np.isfinite(values)
    wide = np.where(is_finite, values, 0).astype(np.float64).clip(-_LARGEST, _LARGEST)
    return [float(wide.sum()), float(np.abs(wide).sum()), _sha256(is_finite)]


def _sha256(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _alike(ours: Any, theirs: Any) -> bool:
    if not (isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs)):
        return bool(ours == theirs)
    if ours and isinstance(ours[0], float):
        (sum_a, size_a, finite_a), (sum_b, size_b, finite_b) = ours, theirs
        tolerance = _TOLERANCE * max(size_a, size_b)
        return bool(finite_a == finite_b and max(abs(sum_a - sum_b), abs(size_a - size_b)) <= tolerance)
    return all(map(_alike, ours, theirs))
