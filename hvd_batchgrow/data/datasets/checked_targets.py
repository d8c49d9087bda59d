"""Computed classes and tokens, checked each time they are read: at the start, only the first ones are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.task_specs import TargetKind
from hvd_batchgrow.data.datasets.dataset import Dataset, Ids
from hvd_batchgrow.data.datasets.targets import check_class_range, check_tokens
from hvd_batchgrow.data.datasets.wrapped_dataset import WrappedDataset


class CheckedTargets(WrappedDataset):
    """A dataset with computed targets, of which each must be in range. `Dataset` describes the members.

    Args:
        samples: the dataset.
        num_classes: C.
        target: that the task needs, "class" or "tokens".
    """

    def __init__(self, samples: Dataset, num_classes: int, target: TargetKind) -> None:
        super().__init__(samples)
        self.targets = _Targets(samples, num_classes, target)

    @property
    def fetch(self) -> Callable[..., Any]:
        """See `Dataset`; with the parameters of the dataset's own `fetch`."""
        return self._samples.fetch


class _Targets:
    """The targets of the dataset; reading one that is out of range raises RunError."""

    def __init__(self, samples: Dataset, num_classes: int, target: TargetKind) -> None:
        self._samples, self._num_classes = samples, num_classes
        self._check = check_class_range if target == "class" else check_tokens

    def __getitem__(self, ids: Ids, /) -> NDArray[Any]:
        found = self._samples.targets[ids]
        self._check(found, self._num_classes, lambda k: self._samples.locate(int(ids[k])))
        return found


def with_checked_targets(samples: Dataset, num_classes: int, target: TargetKind | None) -> Dataset:
    """Return a dataset whose computed classes or tokens are checked when they are read; any other unchanged."""
    if target not in {"class", "tokens"} or isinstance(samples.targets, np.ndarray):
        return samples
    return CheckedTargets(samples, num_classes, target)
