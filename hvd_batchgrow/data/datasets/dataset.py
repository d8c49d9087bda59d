"""Interfaces of a source: a training and a test set, and perhaps a validation set, each read by sample id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.messages.errors import RunError

Ids = NDArray[np.int64]
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Constants of ImageNet's training set, with which its published models normalize."""


class BadSample(RunError):  # noqa: N818  # it names what is bad, not what went wrong
    """A sample that cannot be used.

    Args:
        sample_id: its id in the set.
        where: its file, and its location in the file.
        why: what is wrong with it.
    """

    def __init__(self, sample_id: int, where: str, why: str) -> None:
        self.sample_id, self.where, self.why = sample_id, where, why
        super().__init__(f"{self.describe()}; data.on_bad_sample = 'replace' would continue without it")

    def describe(self) -> str:
        """Return which sample is bad, and why."""
        return f"sample {self.sample_id} ({self.where}): {self.why}"


def raise_bad(bad: BadSample) -> None:
    """Raise the error of a bad sample: the policy of `data.on_bad_sample = 'error'`."""
    raise bad


class Targets(Protocol):
    """The targets of N samples: an array (N, …), or an object that computes them."""

    def __getitem__(self, ids: Ids, /) -> NDArray[Any]:
        """Return the target of each sample, (n, …)."""


class Dataset(Protocol):
    """A set of samples, numbered 0 … len - 1. Each rank holds one, so large arrays should be memory-mapped."""

    @property
    def kind(self) -> Kind:
        """What `fetch` returns: images of one size, rows, encoded image files, samples of any form, or tokens."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (H, W, C), (features,), (tokens,), or (0, 0, C) if each image has its own size.

        Samples of any form: shape of the tensor, as the network receives it; () if there are several tensors.
        """

    @property
    def targets(self) -> Targets:
        """What the network should predict for each sample: its class, int64 (n,), or what the task needs."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2) height and width of each encoded image, 0 if it is known to be bad; (0, 2) for other kinds."""

    def __len__(self) -> int:
        """Return N."""

    def fetch(self, ids: Ids) -> Any:
        """Return copies of some samples, in the order of the ids.

        Returns:
            images: uint8 (n, H, W, C); rows: float32 or float64 (n, features); encoded: n arrays of uint8 (length,);
            samples: an array or a tree of tensors (n, …), as the network gets them; tokens: int64 (n, L).

        Raises:
            BadSample: a sample is missing, truncated or has changed.
        """

    def locate(self, sample_id: int) -> str:
        """Return the location of a sample, for messages."""


NO_SIZES = np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True)
class ArrayDataset:
    """Images of one size, uint8 (N, H, W, C), or rows of numbers (N, features): one array, in memory or mapped."""

    values: NDArray[Any]
    targets: NDArray[Any]
    name: str = "array"
    """For messages: the file, or what else the array is."""
    sizes: NDArray[np.int32] = field(default_factory=lambda: NO_SIZES)

    @property
    def kind(self) -> Kind:
        """Images if the values have four dimensions, else rows."""
        return "images" if self.values.ndim == 4 else "rows"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.values.shape[1:]

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Ids) -> NDArray[Any]:
        """See `Dataset`. Integer rows become float64, which is exact up to 2⁵³."""
        values = self.values[ids]
        return values if self.kind == "images" or values.dtype == np.float32 else values.astype(np.float64)

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return f"{self.name}, entry {sample_id}"


def _do_nothing() -> None:
    pass


@dataclass(frozen=True)
class Datasets:
    """Training and test samples, and the constants that normalize both."""

    train: Dataset
    test: Dataset
    num_classes: int
    mean: tuple[float, ...]
    """Per channel of images scaled to [0, 1]; per feature of rows."""
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    """Remarks on the data, printed when a run starts."""
    schema: Mapping[str, Any] = field(default_factory=dict)
    """Meaning of features and classes, as JSON; stored in the run folder for users of the weights."""
    validation: Dataset | None = None
    """Samples that `data.validation_fraction` holds out of the training set, or the source's own validation set. None:
    the job has no validation set."""
    close: Callable[[], None] = _do_nothing
    """Ends the processes that read ahead. Reading afterwards is an error."""
