"""From a feed to batches: which pipeline makes them, and what happens when a sample is bad."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, DatasetPair, Ids
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.crops import Augment, CentreCrop, CropFlip, ResizedCrop
from hvd_batchgrow.data.pipeline.sampler import EvalSampler, OnBad, RawBatch, Sampler, TrainSampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, torch_inputs
from hvd_batchgrow.messages.errors import Fault, JobError, RunError


@dataclass(frozen=True)
class GhostBatch:
    """One group, as the network takes it, and what it is made of."""

    inputs: Tensor
    """(γ, C, H, W) or (γ, features)."""
    labels: Tensor
    """int64 (γ,)."""
    entries: Ids
    """(γ,) places in the stream."""
    ids: Ids
    """(γ,) the samples that were taken."""
    replaced: NDArray[np.bool_]
    """(γ,) where another sample stands than the stream has there."""


@dataclass(frozen=True)
class Reader:
    """How a job reads its samples on this rank.

    Args:
        data: the job's section.
        source: the samples.
        device: where batches are wanted.
        num_threads: of this rank, the calling one among them.
        on_bad_sample: asked before a bad sample is replaced (training) or left out (testing).
    """

    data: DataSection
    source: DatasetPair
    device: torch.device
    num_threads: int
    on_bad_sample: OnBad

    def training(self, stream: Stream, group: int, first_group: int, stride: int) -> Iterator[GhostBatch]:
        """Training groups first_group, first_group + stride, … without an end. Raises BadSample, RunError."""
        train = self.source.train
        return self._batches(
            TrainSampler(train, stream, training_augment(self.data, train), group, self.on_bad_sample),
            first_group,
            stride,
        )

    def testing(self, chunks: Sequence[range]) -> Iterator[GhostBatch]:
        """The given stretches of the test set, in order, without augmentation. Raises as `training`."""
        test = self.source.test
        return self._batches(EvalSampler(test, testing_augment(self.data, test), chunks, self.on_bad_sample), 0, 1)

    def _batches(self, feed: Sampler, first_group: int, stride: int) -> Iterator[GhostBatch]:
        finish = Normalize(
            self.source.mean,
            self.source.std,
            getattr(torch, self.data.dtype),
            self.data.channels_last,
            self.device,
        )
        kind = choose_pipeline(self.data.pipeline, feed.samples)

        def inputs(first: int) -> Iterator[tuple[RawBatch, Tensor]]:
            if kind == "torch":
                return torch_inputs(feed, finish, first, stride)
            from hvd_batchgrow.data.pipeline.dali_pipeline import dali_inputs

            # On the CPU the calling thread is busy too: it resizes and normalises what DALI has decoded.
            busy = 0 if self.device.type == "cuda" else 1
            return dali_inputs(feed, finish, first, stride, max(1, self.num_threads - busy))

        return batches(feed, inputs, first_group, stride)


def batches(
    feed: Sampler, inputs: Callable[[int], Iterator[tuple[RawBatch, Tensor]]], first_group: int, stride: int
) -> Iterator[GhostBatch]:
    """Batches of a feed; where a bad sample ends a pipeline, a new one goes on without it from the same group.

    Args:
        feed: is asked to replace bad samples.
        inputs: opens a pipeline at a group.
        first_group: where to start.
        stride: from one group to the next.
    """
    group = first_group
    while True:
        try:
            for raw, values in inputs(group):
                group = raw.group + stride  # a stretch without good samples is passed over
                labels = torch.from_numpy(raw.labels).to(values.device, non_blocking=True)
                yield GhostBatch(values, labels, raw.entries, raw.ids, raw.replaced)
            return
        except BadSample as bad:
            feed.replace(bad)


def training_augment(data: DataSection, samples: Dataset) -> Augment | None:
    """How a job draws training samples from their images; None for rows."""
    if samples.kind == "rows":
        return None
    if samples.kind == "images":
        height, width, _ = samples.shape
        return CropFlip((height, width), data.crop_padding, data.hflip)
    side = _crop_pixels(data)
    return ResizedCrop((side, side), data.crop_scale, data.crop_ratio, data.hflip)


def testing_augment(data: DataSection, samples: Dataset) -> Augment | None:
    """What of a test image is looked at; None for rows."""
    if samples.kind == "rows":
        return None
    if samples.kind == "images":
        height, width, _ = samples.shape
        return CentreCrop((height, width), min(height, width))
    side = _crop_pixels(data)
    return CentreCrop((side, side), data.eval_resize or round(side * 8 / 7))


def _crop_pixels(data: DataSection) -> int:
    if data.image_size is None:
        fault = "is needed: images of any size are cut and resized to a square of so many pixels; 224 is usual"
        raise JobError([Fault("data.image_size", fault)])
    return data.image_size


def choose_pipeline(asked: str, samples: Dataset) -> str:
    """ "dali" or "torch": what a job asks for; auto is DALI for images that must be decoded, and torch for arrays.

    Measured on arrays of 32 × 32 images, one thread: torch is faster (docs/data.md).

    Raises:
        JobError: DALI is asked for rows, which it has no use for.
        RunError: DALI is asked for and missing.
    """
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if asked == "dali" and samples.kind == "rows":
        raise JobError([Fault("data.pipeline", "'dali' reads images, and these are rows; 'auto' or 'torch'")])
    if asked == "dali" and not installed:
        raise RunError(
            "data.pipeline = 'dali', but DALI is not installed: pip install 'hvd_batchgrow[dali-cuda130]', "
            "or --data.pipeline torch, which gives the same pixels"
        )
    if asked != "auto":
        return asked
    return "dali" if installed and samples.kind == "encoded" else "torch"
