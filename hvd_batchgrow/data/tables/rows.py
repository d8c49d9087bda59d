"""Rows of a table as inputs of a network, with missing numbers filled in and categories encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import Kind, ReportProgress
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, Ids


@dataclass(frozen=True)
class Encoding:
    """Turns the columns of a file into features; determined by the training rows.

    Args:
        fill: (columns,) replacements of missing numbers; None: no number is missing.
        lookups: for each column of categories, (K,): maps categories of the file to those of the training rows, -1 if
            no training row has the category.
        num_categories: for each column of categories, their number in the training rows.
        one_hot: each category becomes a feature of 0 and 1, all 0 for a missing or unknown category. Otherwise a column
            becomes one feature, the number of the category, or -1 if it is missing or unknown.
    """

    fill: NDArray[np.float64] | None
    lookups: Mapping[int, NDArray[np.int64]]
    num_categories: Mapping[int, int]
    one_hot: bool

    def widths(self, num_columns: int) -> list[int]:
        """Return the number of features of each column."""
        return [self.num_categories.get(k, 1) if self.one_hot else 1 for k in range(num_columns)]

    def spread(self, values: NDArray[np.float64], other: float) -> NDArray[np.float64]:
        """Return a constant for each feature from one for each column; `other` for categories.

        Args:
            values: (columns,).
            other: for features that are not standardized.

        Returns:
            (features,).
        """
        kept = np.array([other if k in self.lookups else value for k, value in enumerate(values)])
        return np.repeat(kept, self.widths(len(values)))

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Convert rows of the file (n, columns) to features (n, features)."""
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
    """Map categories of the file (n,) to those of the training rows; -1 if missing or unknown."""
    return np.append(lookup, -1)[codes.astype(np.int64)]


@dataclass(frozen=True)
class Rows:
    """Some rows of a table. See `Dataset`."""

    values: NDArray[Any]
    """(n, columns) of the file: numbers, NaN if missing, and codes of categories."""
    members: Ids | None
    """(N,) indices of the rows; None: all."""
    targets: NDArray[Any]
    """(N,)."""
    encoding: Encoding
    place: Callable[[int], str]
    """Returns the location of a row, for messages."""
    kind: Kind = "rows"
    sizes: NDArray[np.int32] = field(default_factory=lambda: NO_SIZES)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (features,)."""
        return (sum(self.encoding.widths(self.values.shape[1])),)

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Ids) -> NDArray[Any]:
        """See `Dataset`."""
        return self.encoding.apply(self.stored(ids))

    def stored(self, ids: Ids) -> NDArray[Any]:
        """Return rows as in the file: numbers, and codes of categories."""
        return self.values[ids if self.members is None else self.members[ids]]

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return self.place(sample_id if self.members is None else int(self.members[sample_id]))

    def chunks(self, what: str, report: ReportProgress) -> Iterator[NDArray[Any]]:
        """Yield all rows as stored, in order and a few megabytes at a time, and report the progress."""
        length = max(1, _CHUNK_CELLS // self.values.shape[1])
        cells = 8 * self.values.shape[1]
        for start in range(0, len(self), length):
            stop = min(start + length, len(self))
            yield self.stored(np.arange(start, stop))
            report(what, stop * cells, len(self) * cells)


_CHUNK_CELLS = 1 << 20
