"""Hold out a part of the training set for validation, the same part in every layout and at every resume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.config.split import num_held_out
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, BadSample, Dataset, DatasetPair, Ids
from hvd_batchgrow.data.order.stream import keyed_permutation

_DOMAIN = 1
"""Separates the draw from those of the epochs, which have domain 0."""


class Subset:
    """Some samples of a dataset, numbered 0 … n - 1.

    Args:
        whole: the dataset.
        size: n.
        ids_in_whole: returns the ids in `whole` of ids in the subset.
    """

    def __init__(self, whole: Dataset, size: int, ids_in_whole: Callable[[Ids], Ids]) -> None:
        self.whole, self._size, self.ids_in_whole = whole, size, ids_in_whole
        self.labels = _SubsetLabels(self)

    def __len__(self) -> int:
        return self._size

    @property
    def kind(self) -> Kind:
        """See `Dataset`."""
        return self.whole.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Dataset`."""
        return self.whole.shape

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """See `Dataset`."""
        return self.whole.sizes[self.ids_in_whole(np.arange(len(self)))] if self.kind == "encoded" else NO_SIZES

    def fetch(self, ids: Ids) -> Any:
        """See `Dataset`. A bad sample is named by its id in the subset."""
        theirs = self.ids_in_whole(ids)
        try:
            return self.whole.fetch(theirs)
        except BadSample as bad:
            (found,) = np.flatnonzero(theirs == bad.sample_id)[:1]
            raise BadSample(int(ids[found]), bad.where, bad.why) from None

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return self.whole.locate(int(self.ids_in_whole(np.array([sample_id]))[0]))


class _SubsetLabels:
    """The classes of a subset."""

    def __init__(self, subset: Subset) -> None:
        self._subset = subset

    def __getitem__(self, ids: Ids, /) -> NDArray[np.int64]:
        return self._subset.whole.labels[self._subset.ids_in_whole(ids)]


def origin(samples: Dataset, sample_id: int) -> tuple[Dataset, int]:
    """Return the dataset that holds a sample, and its id there: of a subset, those of the whole set."""
    if isinstance(samples, Subset):
        return samples.whole, int(samples.ids_in_whole(np.array([sample_id]))[0])
    return samples, sample_id


def held_out_ids(num_samples: int, fraction: float, seed: int) -> Ids:
    """Return the ids of the validation samples, ascending: a pure function of seed, number of samples and fraction.

    The ids are a simple random sample without regard to classes. Those of a smaller fraction are among those of a
    larger one.

    Args:
        num_samples: of the source.
        fraction: in [0, 1); the number of ids is rounded up.
        seed: of the job.

    Returns:
        int64 (⌈fraction · num_samples⌉,).
    """
    draw = keyed_permutation(num_samples, seed, 0, _DOMAIN)
    return np.sort(draw(np.arange(num_held_out(num_samples, fraction), dtype=np.int64)))


def _without(before: Ids, ids: Ids) -> Ids:
    return ids + np.searchsorted(before, ids, side="right")


def with_validation(source: DatasetPair, fraction: float, seed: int) -> DatasetPair:
    """Return a source without its validation samples in the training set, but in `validation`.

    The remaining training samples keep their order. Only the validation ids are held in memory.

    Args:
        source: the samples; its constants remain those of the whole training set.
        fraction: `data.validation_fraction`, which leaves at least one training sample.
        seed: of the job.
    """
    held_out = held_out_ids(len(source.train), fraction, seed)
    # Before the training sample k there are as many validation samples as have at most k training samples before them.
    before = held_out - np.arange(len(held_out))
    train = Subset(source.train, len(source.train) - len(held_out), partial(_without, before))
    validation = Subset(source.train, len(held_out), partial(np.take, held_out))
    fingerprint = {"num_samples": len(held_out), "sha256": hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()}
    schema = {**source.schema, "validation": fingerprint}
    return replace(source, train=train, validation=validation, schema=schema)
