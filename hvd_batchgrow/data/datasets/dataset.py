"""What a source is made of: two sets of samples, each read by sample id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError

Ids = NDArray[np.int64]
Kind = Literal["images", "rows", "encoded"]
ReportProgress = Callable[[str, int, int], None]
"""Told of what takes long: (what, done, total), both in bytes."""
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training set, as its published models are normalised."""


class BadSample(RunError):  # noqa: N818  # it names what is bad, not what went wrong
    """A sample that cannot be used.

    Args:
        sample_id: its id in the set.
        where: its file, and its place in there.
        why: what is wrong with it.
    """

    def __init__(self, sample_id: int, where: str, why: str) -> None:
        self.sample_id, self.where, self.why = sample_id, where, why
        super().__init__(f"{self.describe()}; data.on_bad_sample = 'replace' would go on without it")

    def describe(self) -> str:
        """Which sample, and what is wrong with it."""
        return f"sample {self.sample_id} ({self.where}): {self.why}"


def raise_bad(bad: BadSample) -> None:
    """What is done about bad samples where none is tolerated."""
    raise bad


class Labels(Protocol):
    """The classes of N samples: an array of int64, or whatever else gives the classes of some of them."""

    def __getitem__(self, ids: Ids, /) -> NDArray[np.int64]:
        """Class of each, (n,)."""


class Dataset(Protocol):
    """A set of samples, numbered 0 … len - 1. All ranks of a host hold one, so large arrays are best memory-mapped."""

    @property
    def kind(self) -> Kind:
        """What `fetch` returns: images of one size, rows of a table, or files yet to be decoded."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (H, W, C), (features,), or (0, 0, C) where each has its own size."""

    @property
    def labels(self) -> Labels:
        """Class of each sample."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2) height and width of each encoded image, 0 where it is known to be bad; else (0, 2)."""

    def __len__(self) -> int:
        """N."""

    def fetch(self, ids: Ids) -> Any:
        """Copies of some samples, in the order of the ids.

        Returns:
            images: uint8 (n, H, W, C); rows: float32 or float64 (n, features); encoded: n arrays of uint8 (length,).

        Raises:
            BadSample: one of them is missing, truncated or otherwise not what it was.
        """

    def locate(self, sample_id: int) -> str:
        """The place of a sample, for messages."""


NO_SIZES = np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True)
class ArrayDataset:
    """Images of one size, uint8 (N, H, W, C), or rows of numbers (N, features): one array, in memory or mapped."""

    values: NDArray[Any]
    labels: NDArray[np.int64]
    name: str = "array"
    """For messages: the file, or what else the array is."""
    sizes: NDArray[np.int32] = field(default_factory=lambda: NO_SIZES)

    @property
    def kind(self) -> Kind:
        """By the number of dimensions."""
        return "images" if self.values.ndim == 4 else "rows"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.values.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, ids: Ids) -> NDArray[Any]:
        """See `Dataset`. Rows of integers become float64, which is exact up to 2⁵³."""
        values = self.values[ids]
        return values if self.kind == "images" or values.dtype == np.float32 else values.astype(np.float64)

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return f"{self.name}, entry {sample_id}"


@dataclass(frozen=True)
class DatasetPair:
    """Training and test samples, and the constants that normalise both."""

    train: Dataset
    test: Dataset
    num_classes: int
    mean: tuple[float, ...]
    """Per channel of images scaled to [0, 1]; per feature of rows."""
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    """What the user should know about the data; printed when a run starts."""
    schema: Mapping[str, Any] = field(default_factory=dict)
    """What a sample's features and classes mean, as JSON, for those who use the weights; kept in the run folder."""


def check_labels(labels: NDArray[np.int64], num_classes: int, place: str) -> None:
    """Every label must be 0 … num_classes - 1.

    Raises:
        RunError: naming the first samples that are not, and how many there are.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        shown = ", ".join(f"sample {k} has {labels[k]}" for k in wrong[:5])
        raise RunError(f"{place}: {len(wrong)} of {len(labels)} labels are not in 0 … {num_classes - 1}: {shown}")
