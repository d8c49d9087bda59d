"""A dataset that changes one member of another one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.data.datasets.dataset import Dataset


class WrappedDataset:
    """The members of a dataset that its wrappers share; each wrapper adds `targets` and `fetch`. See `Dataset`.

    Args:
        samples: the dataset.
    """

    def __init__(self, samples: Dataset) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def kind(self) -> Kind:
        """See `Dataset`."""
        return self._samples.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Dataset`."""
        return self._samples.shape

    @property
    def sizes(self) -> NDArray[np.int32]:
        """See `Dataset`."""
        return self._samples.sizes

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return self._samples.locate(sample_id)
