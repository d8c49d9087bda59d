"""What ranks and runs compare to notice that they have other samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.data.changed_data import Summary
from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, Datasets
from hvd_batchgrow.data.datasets.subset import resolve, whole_of
from hvd_batchgrow.data.samples.reproducible import ids_to_compare
from hvd_batchgrow.data.samples.sample_dataset import SampleDataset
from hvd_batchgrow.data.tensor_tree import tensors_in

_LARGEST = 1e150
"""Numbers are limited to it, so that their sum is finite."""

_PART_BYTES = 1 << 26


def sample_summary(source: Datasets) -> Summary:
    """Return plain values that differ if another source has other samples: a few of each set are read, spread over it.

    Bytes and whole numbers are summarized by a SHA-256. Other numbers are summarized by the sum of the finite ones, the
    sum of their magnitudes, and a SHA-256 of which of them are finite.
    """
    sets = {"training": source.train, "validation": source.validation, "test": source.test}
    found: Summary = {}
    for name, samples in sets.items():
        if samples is not None:
            found |= _set_summary(name, samples)
    return found


def evaluation_sets(source: Datasets) -> dict[str, Summary]:
    """Return summaries of the validation set and the test set, for `record.json`; not of parts of the training set."""
    sets = {"validation": source.validation, "test": source.test}
    return {
        name: _set_summary(name, samples)
        for name, samples in sets.items()
        if samples is not None and whole_of(samples) is not whole_of(source.train)
    }


def _set_summary(name: str, samples: Dataset) -> Summary:
    found: Summary = {f"the number of {name} samples": [len(samples)]}
    if isinstance(whole_of(samples).targets, np.ndarray):
        found[f"the {name} targets"] = [_summarized(part) for part in _targets(samples)]
    with suppress(BadSample):  # it is reported when it is needed
        found[f"the {name} samples"] = [_summarized(part) for part in _arrays(samples)]
    return found


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
