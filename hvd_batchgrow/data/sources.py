"""Sources: where images and labels come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data import fashion_mnist
from hvd_batchgrow.data.fashion_mnist import ReportBytes
from hvd_batchgrow.data.idx import read_idx
from hvd_batchgrow.errors import Fault, JobError, RunError


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, in memory."""

    images: NDArray[np.uint8]
    """(N, H, W, C)."""
    labels: NDArray[np.int64]
    """(N,)."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """Training and test images, and the constants that normalise both."""

    train: ImageSet
    test: ImageSet
    num_classes: int
    mean: tuple[float, ...]
    """Per channel, of the training images scaled to [0, 1]."""
    deviation: tuple[float, ...]


def load_source(data: DataSection, report: ReportBytes) -> Source:
    """Read a source into memory, fetching it first where that is possible.

    Raises:
        RunError: missing, damaged, or not as large as the job says.
    """
    if data.source == "fashion_mnist":
        folder = fashion_mnist.find(data.root, report)
        source = _read_idx_source(folder, fashion_mnist.SHA256)
    elif data.source != "idx":
        fault = f"{data.source!r} can be planned, not read; this version reads 'fashion_mnist' and 'idx'"
        raise JobError([Fault("data.source", fault)])
    elif data.root is None:
        raise JobError([Fault("data.root", "is needed for the source 'idx': the folder of its four files")])
    else:
        source = _read_idx_source(Path(data.root), {})
    if data.num_samples not in (None, len(source.train)):
        raise RunError(f"data.num_samples = {data.num_samples}, but {len(source.train)} training samples were found")
    return source


def _read_idx_source(folder: Path, sha256: dict[str, str]) -> Source:
    arrays = []
    for name in fashion_mnist.SHA256:  # the names of the MNIST family
        present = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
        if not present:
            raise RunError(f"{folder} holds neither {name} nor {name}.gz")
        arrays.append(read_idx(present[0], sha256.get(name)))
    train = _image_set(folder, *arrays[:2])
    test = _image_set(folder, *arrays[2:])
    if train.images.shape[1:] != test.images.shape[1:]:
        raise RunError(f"{folder}: training images are {train.images.shape[1:]}, test images {test.images.shape[1:]}")
    mean, deviation = _moments(train.images)
    return Source(train, test, int(train.labels.max()) + 1, mean, deviation)


def _image_set(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> ImageSet:
    if images.dtype != np.uint8 or labels.dtype != np.uint8:
        raise RunError(f"{folder}: images are {images.dtype} and labels {labels.dtype}; both must be bytes (uint8)")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise RunError(f"{folder}: images {images.shape} and labels {labels.shape} do not belong together")
    return ImageSet(images[..., None], labels.astype(np.int64))


def _moments(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of images scaled to [0, 1], from histograms: exact, and without a float copy."""
    values = np.arange(256) / 255.0
    means, deviations = [], []
    for channel in np.moveaxis(images, -1, 0):
        weights = np.bincount(channel.reshape(-1), minlength=256) / channel.size
        mean = float(weights @ values)
        means.append(mean)
        deviations.append(max(float(weights @ (values - mean) ** 2) ** 0.5, 1 / 255))
    return tuple(means), tuple(deviations)
