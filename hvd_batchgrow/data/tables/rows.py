"""Rows of a table as a network takes them: missing numbers filled in, categories encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import NO_SIZES, Ids, Kind, ReportProgress


@dataclass(frozen=True)
class Encoding:
    """From the columns of a file to features; made from the training rows.

    Args:
        fill: (columns,) what a missing number becomes; None: no number is missing.
        lookups: of each column of categories, (K,): from a category of the file to one of the training rows, -1 if
            no training row has it.
        num_categories: of each column of categories, how many the training rows have.
        one_hot: a category becomes a feature for each of them, 1 for its own and 0 for the others, which are all 0
            for one that is missing or unknown; else its number, -1 for one that is missing or unknown.
    """

    fill: NDArray[np.float64] | None
    lookups: Mapping[int, NDArray[np.int64]]
    num_categories: Mapping[int, int]
    one_hot: bool

    def widths(self, num_columns: int) -> list[int]:
        """How many features each column becomes."""
        return [self.num_categories.get(k, 1) if self.one_hot else 1 for k in range(num_columns)]

    def spread(self, values: NDArray[np.float64], other: float) -> NDArray[np.float64]:
        """A constant of each column for each feature; `other` for those of categories.

        Args:
            values: (columns,).
            other: for features that are not standardised.

        Returns:
            (features,).
        """
        kept = np.array([other if k in self.lookups else value for k, value in enumerate(values)])
        return np.repeat(kept, self.widths(len(values)))

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Turn rows of the file (n, columns) into rows of features (n, features)."""
        if self.fill is not None:
            values = np.where(np.isnan(values), self.fill, values)
        if not self.lookups:
            return values
        ends = np.cumsum(self.widths(values.shape[1]))
        features = np.zeros((len(values), ends[-1]), dtype=values.dtype)
        for k, end in enumerate(ends.tolist()):
            if k not in self.lookups:
                features[:, end - 1] = values[:, k]
                continue
            codes = known(self.lookups[k], values[:, k])
            if self.one_hot:
                rows = np.flatnonzero(codes >= 0)
                features[rows, end - self.num_categories[k] + codes[rows]] = 1
            else:
                features[:, end - 1] = codes
        return features


def known(lookup: NDArray[np.int64], codes: NDArray[Any]) -> NDArray[np.int64]:
    """Categories of the file (n,) as those of the training rows; -1 for those that are missing or unknown."""
    return np.append(lookup, -1)[codes.astype(np.int64)]


@dataclass(frozen=True)
class Rows:
    """Some rows of a table. See `Dataset`."""

    values: NDArray[Any]
    """(n, columns) of the file: numbers, NaN where one is missing, and codes of categories."""
    members: Ids | None
    """(N,) which rows; None: all."""
    labels: NDArray[np.int64]
    """(N,)."""
    encoding: Encoding
    place: Callable[[int], str]
    """The place of a row among the values."""
    kind: Kind = "rows"
    sizes: NDArray[np.int32] = field(default_factory=lambda: NO_SIZES)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (features,)."""
        return (sum(self.encoding.widths(self.values.shape[1])),)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, ids: Ids) -> NDArray[Any]:
        """See `Dataset`."""
        return self.encoding.apply(self.stored(ids))

    def stored(self, ids: Ids) -> NDArray[Any]:
        """Rows as they are in the file: numbers, and codes of categories."""
        return self.values[ids if self.members is None else self.members[ids]]

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return self.place(sample_id if self.members is None else int(self.members[sample_id]))

    def chunks(self, what: str, report: ReportProgress) -> Iterator[NDArray[Any]]:
        """All rows as stored, in order and a few megabytes at a time, with the progress reported."""
        length = max(1, _CHUNK_CELLS // self.values.shape[1])
        cells = 8 * self.values.shape[1]
        for start in range(0, len(self), length):
            stop = min(start + length, len(self))
            yield self.stored(np.arange(start, stop))
            report(what, stop * cells, len(self) * cells)


_CHUNK_CELLS = 1 << 20
