"""Samplers: the inputs of pipelines, one micro-batch at a time: encoded bytes or pixels, and their crops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, Ids, raise_bad
from hvd_batchgrow.data.datasets.subset import resolve, whole_of
from hvd_batchgrow.data.order.stream import Stream, sample_draws
from hvd_batchgrow.data.pipeline.crops import Augment, CropParams
from hvd_batchgrow.data.pipeline.pixel_augment import PixelAugment, PixelParams
from hvd_batchgrow.data.pipeline.read_ahead import fetch_ahead
from hvd_batchgrow.data.samples.keyed_fetch import fetch_of_epochs
from hvd_batchgrow.data.samples.sample_dataset import SampleDataset
from hvd_batchgrow.messages.errors import RunError

OnBad = Callable[[BadSample], None]
"""Called with a bad sample before it is replaced; raises it if the job does not replace bad samples."""

_DRAWN_AT_ONCE = 2048
"""The ids and draws of at least this many samples are computed in one call, to amortize its overhead."""

NumGhostBatches = Callable[[int], int]
"""Called with a ghost batch: with how many of the rank's ghost batches the batch is formed that begins with it.

0: the stream ends before it."""


def one_by_one(index: int) -> int:
    """Form each batch of one ghost batch; see `NumGhostBatches`."""
    return 1


@dataclass(frozen=True)
class RawBatch:
    """Consecutive ghost batches of a rank, or a range of a test set, as the input of a pipeline: n samples."""

    next_ghost_batch: int
    """The ghost batch after them, from which a reopened pipeline continues."""
    stream_index: Ids
    """(n,) indices in the stream."""
    ids: Ids
    """(n,) sample ids, after replacement of bad samples."""
    epochs: Ids
    """(n,) the epoch of each sample; 0 in a validation or test set."""
    targets: Any
    """(n, …). For a torch Dataset a tree of tensors, and None before the samples are drawn."""
    values: Any
    """From `Dataset.fetch`; None before."""
    placement: CropParams | None
    """None for rows."""
    replaced: NDArray[np.bool_]
    """(n,) whether the sample replaces a bad one of the stream."""
    pixel_params: PixelParams | None = None
    """How the images are changed after the crop; None: not at all."""


class Sampler(ABC):
    """The samples of a set, in batches."""

    def __init__(self, samples: Dataset, augment: Augment | None, on_bad_sample: OnBad) -> None:
        self.samples, self.augment, self.on_bad_sample = samples, augment, on_bad_sample
        self._bad = known_bad(samples)
        self.not_for_dali: set[int] = set()
        """Samples on which DALI failed, which Pillow decodes."""

    def raw_batches(self, first: int, stride: int) -> Iterator[RawBatch]:
        """Yield batches of the ghost batches or ranges first, first + stride, … Raises BadSample when one is read."""
        return _filled(self.samples, self._empty_batches(first, stride))

    @abstractmethod
    def _empty_batches(self, first: int, stride: int) -> Iterator[RawBatch]:
        """Yield batches without the values of their samples."""

    def replace(self, bad: BadSample) -> None:
        """Replace or skip a bad sample from now on. Raises what `on_bad_sample` raises."""
        self.on_bad_sample(bad)
        self._bad.add(bad.sample_id)


class TrainSampler(Sampler):
    """The ghost batches of one rank, in stream order, in batches of one or several.

    The next good sample of the stream replaces a bad sample. It is the same in every layout.

    Args:
        samples: the training set.
        stream: over its ids.
        augment: the rule for crops; None for rows.
        ghost_batch: γ.
        on_bad_sample: called before a bad sample is replaced.
        num_ghost_batches: of each batch; called some batches ahead.
        pixel_augment: the rules for pixels after the crop.
    """

    def __init__(
        self,
        samples: Dataset,
        stream: Stream,
        augment: Augment | None,
        ghost_batch: int,
        on_bad_sample: OnBad = raise_bad,
        num_ghost_batches: NumGhostBatches = one_by_one,
        pixel_augment: PixelAugment | None = None,
    ) -> None:
        super().__init__(samples, augment, on_bad_sample)
        self.stream, self.ghost_batch = stream, ghost_batch
        self.pixel_augment, self.num_ghost_batches = pixel_augment, num_ghost_batches

    def _empty_batches(self, first: int, stride: int) -> Iterator[RawBatch]:
        while num_drawn := self._num_drawn(first, stride):
            indices = range(first, first + num_drawn * stride, stride)
            stream_index = (np.array(indices)[:, None] * self.ghost_batch + np.arange(self.ghost_batch)).reshape(-1)
            epochs, ids, replaced = self._good(stream_index)
            placement = self._place(epochs, ids)
            augment = self.pixel_augment
            pixels = augment.sample(self.stream.seed, epochs, ids) if augment else None
            while first < indices.stop:
                end = first + self.num_ghost_batches(first) * stride
                part = slice(*(self.ghost_batch * ((k - indices.start) // stride) for k in (first, end)))
                first = min(end, indices.stop)
                targets, place = targets_of(self.samples, ids[part]), placement and placement[part]
                own = stream_index[part], ids[part], epochs[part], targets, None, place, replaced[part]
                yield RawBatch(first, *own, pixels and pixels[part])

    def _num_drawn(self, first: int, stride: int) -> int:
        """Return the number of ghost batches of the next batches, whose ids and draws are computed in one call."""
        total = 0
        while total * self.ghost_batch < _DRAWN_AT_ONCE and (count := self.num_ghost_batches(first + total * stride)):
            total += count
        return total

    def _place(self, epochs: Ids, ids: Ids) -> CropParams | None:
        if self.augment is None:
            return None
        draws = sample_draws(self.stream.seed, epochs, ids, self.augment.num_draws)
        return self.augment.sample_crops(draws, sizes_of(self.samples, ids))

    def _good(self, stream_index: Ids) -> tuple[Ids, Ids, NDArray[np.bool_]]:
        """Return epochs and ids of good samples for indices in the stream, and which are replacements."""
        epochs, ids = self.stream.at(stream_index)
        replaced = np.zeros(len(stream_index), dtype=bool)
        if not self._bad:
            return epochs, ids, replaced
        if len(self._bad) == len(self.samples):
            raise RunError(f"all {len(self.samples)} training samples are bad: {self.samples.locate(0)}, …")
        bad = np.array(sorted(self._bad))
        ahead = 1
        while len(where := np.flatnonzero(np.isin(ids, bad))):
            epochs[where], ids[where] = self.stream.at(stream_index[where] + ahead)
            replaced[where] = True
            ahead += 1
        return epochs, ids, replaced


class EvalSampler(Sampler):
    """Ranges of a set, in order and without augmentation; samples known to be bad are skipped.

    Args:
        samples: the test set.
        augment: a rule without draws; None for rows.
        chunks: the ranges.
        on_bad_sample: called before a bad sample is skipped.
    """

    def __init__(
        self, samples: Dataset, augment: Augment | None, chunks: Sequence[range], on_bad_sample: OnBad = raise_bad
    ) -> None:
        super().__init__(samples, augment, on_bad_sample)
        self.chunks = chunks

    def _empty_batches(self, first: int, stride: int) -> Iterator[RawBatch]:
        for index in range(first, len(self.chunks), stride):
            chunk = self.chunks[index]
            ids = np.array([k for k in chunk if k not in self._bad], dtype=np.int64)
            placement = None
            if self.augment is not None:
                placement = self.augment.sample_crops(np.empty((len(ids), 0)), sizes_of(self.samples, ids))
            if len(ids):
                epochs, replaced = np.zeros_like(ids), np.zeros(len(ids), dtype=bool)
                targets = targets_of(self.samples, ids)
                yield RawBatch(index + stride, ids, ids, epochs, targets, None, placement, replaced)


def _filled(samples: Dataset, batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
    """Yield batches with the values of their samples. Files and torch Datasets are read ahead; arrays need not be."""
    whole = whole_of(samples)
    if isinstance(whole, SampleDataset):
        batches, to_draw = tee(batches)
        drawn = whole.read((raw.epochs, resolve(samples, raw.ids)[1]) for raw in to_draw)
        for raw, (inputs, targets) in zip(batches, drawn, strict=False):
            yield replace(raw, values=inputs, targets=targets)
        return
    if samples.kind != "encoded":
        yield from (replace(raw, values=fetch_of_epochs(samples, raw.ids, raw.epochs)) for raw in batches)
        return
    batches, to_fetch = tee(batches)
    fetched = fetch_ahead(samples, (raw.ids for raw in to_fetch))
    yield from (replace(raw, values=values) for raw, values in zip(batches, fetched, strict=True))


def targets_of(samples: Dataset, ids: Ids) -> NDArray[Any] | None:
    """Return the targets of some samples; None if they are known only when the samples are drawn."""
    return None if isinstance(whole_of(samples), SampleDataset) else samples.targets[ids]


def sizes_of(samples: Dataset, ids: Ids) -> NDArray[np.int32]:
    """Return (n, 2) height and width of images."""
    if samples.kind == "encoded":
        return samples.sizes[ids]
    return np.broadcast_to(np.array(samples.shape[:2], dtype=np.int32), (len(ids), 2))


def known_bad(samples: Dataset) -> set[int]:
    """Return the ids of samples that the index marks as bad."""
    return set(np.flatnonzero(samples.sizes.min(axis=1) == 0).tolist()) if samples.kind == "encoded" else set()
