"""Synthetic samples, computed on demand: any number, without memory, faster than training consumes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import Kind, ReportProgress
from hvd_batchgrow.config.split import num_held_out
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, Datasets, Ids
from hvd_batchgrow.data.datasets.normalization import image_moments, row_moments
from hvd_batchgrow.data.order.philox import philox4x32

_DOMAIN = np.uint64(0xFFFFFFFF)
"""Fourth word of the counter. It is small in the draws of `sample_draws`, which use the same key."""
_POSITIONS = {"images": 1 << 20, "rows": 1 << 18}
"""Windows of a bank, a power of two: a bank of a megabyte stays in a core's cache."""
_BLOCK_BYTES = 1 << 16
"""Computed at once: few enough to stay in the cache between the steps."""


class SyntheticLabels:
    """Labels that are a pure function of seed and id, uniform over the classes.

    Args:
        seed: 0 <= seed < 2⁶³.
        ids: of the samples in the numbering that training and test samples share.
        num_classes: C.
    """

    def __init__(self, seed: int, ids: range, num_classes: int) -> None:
        self._seed, self._ids, self._num_classes = seed, ids, num_classes

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, ids: Ids, /) -> NDArray[np.int64]:
        """Return the class of each sample, int64 (n,)."""
        return self.of_words(self.words(ids))

    def words(self, ids: Ids) -> NDArray[np.uint64]:
        """Return four random 32-bit words per sample, (4, n). Raise IndexError for an id outside 0 … N - 1."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"ids {ids.min()} … {ids.max()} are not in 0 … {len(self) - 1}")
        shared = (ids + self._ids.start).astype(np.uint64)
        counter = np.zeros((4, len(ids)), dtype=np.uint64)
        counter[0], counter[1], counter[3] = shared & np.uint64(0xFFFFFFFF), shared >> np.uint64(32), _DOMAIN
        return philox4x32(counter, (self._seed & 0xFFFFFFFF, self._seed >> 32))

    def of_words(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return ⌊w C / 2³²⌋ for the first word w."""
        scaled: NDArray[np.uint64] = words[0] * np.uint64(self._num_classes)
        return (scaled >> np.uint64(32)).astype(np.int64)


class SyntheticDataset:
    """Noise around a pattern for each class, a pure function of seed and id.

    With windows at two random positions i and j of a bank of random numbers,

        sample = pattern[label] + bank[i : i + size] + bank[j : j + size].

    For images, the pattern is 4 × 4 patches of one color each, 0 … 63, and the bank holds 0 … 95. For rows, patterns
    are normal with std ½, and the noise is normal with std 1.

    Args:
        kind: images or rows.
        shape: of a sample.
        seed: 0 <= seed < 2⁶³.
        ids: of the samples in the numbering that training and test samples share.
        num_classes: C.
    """

    sizes = NO_SIZES

    def __init__(self, kind: Kind, shape: tuple[int, ...], seed: int, ids: range, num_classes: int) -> None:
        self.kind, self.shape = kind, shape
        self.targets = SyntheticLabels(seed, ids, num_classes)
        generator = np.random.Generator(np.random.Philox(key=seed))
        tables: tuple[NDArray[Any], NDArray[Any]]
        tables = (_image_tables if kind == "images" else _row_tables)(generator, shape, num_classes)
        self._patterns: NDArray[Any] = tables[0]
        self._windows: NDArray[Any] = sliding_window_view(tables[1], math.prod(shape))

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Ids) -> NDArray[Any]:
        """See `Dataset`."""
        words = self.targets.words(ids)
        labels = self.targets.of_words(words)
        first, second = (words[1:3] & np.uint64(len(self._windows) - 1)).astype(np.int64)
        samples = np.empty((len(labels), self._windows.shape[1]), dtype=self._windows.dtype)
        length = max(1, _BLOCK_BYTES // samples[:1].nbytes) if len(labels) else 1
        for start in range(0, len(labels), length):
            part = slice(start, start + length)
            np.add(self._windows[first[part]], self._windows[second[part]], out=samples[part])
            samples[part] += self._patterns[labels[part]]
        return samples.reshape(-1, *self.shape)

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return f"synthetic {self.kind}, number {sample_id}"


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Load the sources `synthetic_images` and `synthetic_rows`.

    Training samples are 0 … N - 1. They are followed by T test samples, where T is ⌈`data.test_fraction` · N⌉, and at
    least ten per class. Mean and std are those of the first few thousand training samples.

    Args:
        data: without `_faults`; sets the number of samples, their shape (default 32 × 32 × 3, or 54) and the classes
            (default 10).
        seed: of the job.
        report: not called.
    """
    assert data.num_samples is not None
    kind: Kind = "images" if data.source == "synthetic_images" else "rows"
    shape = data.shape or ((32, 32, 3) if kind == "images" else (54,))
    num_samples, num_classes = data.num_samples, data.num_classes or 10
    num_test = max(num_held_out(num_samples, data.test_fraction), 10 * num_classes)
    parts = range(num_samples), range(num_samples, num_samples + num_test)
    train, test = (SyntheticDataset(kind, shape, seed, ids, num_classes) for ids in parts)
    mean, std = (tuple(map(float, moment)) for moment in _moments(train))
    return Datasets(train, test, num_classes, mean, std)


def _image_tables(
    generator: np.random.Generator, shape: tuple[int, ...], num_classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return patterns (C, H·W·channels) and bank; 63 + 95 + 95 fits into a byte."""
    height, width, channels = shape
    patches = generator.integers(0, 64, (num_classes, 4, 4, channels), dtype=np.uint8)
    patterns = patches[:, np.arange(height) * 4 // height][:, :, np.arange(width) * 4 // width]
    bank = generator.integers(0, 96, _POSITIONS["images"] + math.prod(shape) - 1, dtype=np.uint8)
    return patterns.reshape(num_classes, -1), bank


def _row_tables(
    generator: np.random.Generator, shape: tuple[int, ...], num_classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return patterns (C, features) and bank; the sum of two numbers of variance ½ has variance 1."""
    patterns = generator.standard_normal((num_classes, *shape), dtype=np.float32) * np.float32(0.5)
    bank = generator.standard_normal(_POSITIONS["rows"] + shape[0] - 1, dtype=np.float32) * np.float32(0.5**0.5)
    return patterns, bank


def _moments(train: SyntheticDataset) -> Iterable[NDArray[np.float64]]:
    count = min(len(train), 4096, max(16, (1 << 24) // math.prod(train.shape)))
    samples = train.fetch(np.arange(count))
    return image_moments([samples]) if train.kind == "images" else row_moments([samples], "synthetic rows")
