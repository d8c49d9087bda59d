"""A part of a dataset, itself a dataset."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, BadSample, Dataset, Ids


class Subset:
    """Some samples of a dataset, numbered 0 … n - 1.

    Args:
        whole: the dataset.
        size: n.
        ids_in_whole: returns the ids in `whole` of ids in the subset.
    """

    def __init__(self, whole: Dataset, size: int, ids_in_whole: Callable[[Ids], Ids]) -> None:
        self.whole, self._size, self.ids_in_whole = whole, size, ids_in_whole
        self.targets = _SubsetTargets(self)

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


class _SubsetTargets:
    """The targets of a subset."""

    def __init__(self, subset: Subset) -> None:
        self._subset = subset

    def __getitem__(self, ids: Ids, /) -> NDArray[np.int64]:
        return self._subset.whole.targets[self._subset.ids_in_whole(ids)]


def origin(samples: Dataset, sample_id: int) -> tuple[Dataset, int]:
    """Return the dataset that holds a sample, and its id there: of a subset, those of the whole set."""
    whole, ids = resolve(samples, np.array([sample_id]))
    return whole, int(ids[0])


def resolve(samples: Dataset, ids: Ids) -> tuple[Dataset, Ids]:
    """Return the dataset that holds some samples, and their ids there. A subset may be one of a subset."""
    if not isinstance(samples, Subset):
        return samples, ids
    return resolve(samples.whole, samples.ids_in_whole(ids))


def whole_of(samples: Dataset) -> Dataset:
    """Return the dataset that holds the samples of a subset; another dataset itself."""
    return resolve(samples, np.zeros(0, dtype=np.int64))[0]
