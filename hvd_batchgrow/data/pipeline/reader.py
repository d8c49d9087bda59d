"""From a sampler to batches: choose the pipeline, and handle bad samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, DatasetPair, Ids
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.crops import Augment, CentreCrop, CropFlip, ResizedCrop
from hvd_batchgrow.data.pipeline.sampler import EvalSampler, OnBad, RawBatch, Sampler, TrainSampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, torch_inputs
from hvd_batchgrow.messages.errors import Fault, JobError, RunError


@dataclass(frozen=True)
class GhostBatch:
    """One ghost batch: the network's inputs and labels, and their samples."""

    inputs: Tensor
    """(γ, C, H, W) or (γ, features)."""
    labels: Tensor
    """int64 (γ,)."""
    stream_index: Ids
    """(γ,) indices in the stream."""
    ids: Ids
    """(γ,) sample ids."""
    replaced: NDArray[np.bool_]
    """(γ,) whether the sample replaces a bad one of the stream."""


@dataclass(frozen=True)
class Reader:
    """How a job reads its samples on this rank.

    Args:
        data: the job's section.
        source: the samples.
        device: of the batches.
        num_threads: of this rank, including the calling thread.
        on_bad_sample: called before a bad sample is replaced (training) or skipped (testing).
    """

    data: DataSection
    source: DatasetPair
    device: torch.device
    num_threads: int
    on_bad_sample: OnBad

    def training(self, stream: Stream, group: int, first_group: int, stride: int) -> Iterator[GhostBatch]:
        """Yield ghost batches first_group, first_group + stride, … endlessly. Raises BadSample, RunError."""
        train = self.source.train
        return self._batches(
            TrainSampler(train, stream, training_augment(self.data, train), group, self.on_bad_sample),
            first_group,
            stride,
        )

    def testing(self, chunks: Sequence[range]) -> Iterator[GhostBatch]:
        """Yield the given ranges of the test set, in order, without augmentation. Raises as `training`."""
        test = self.source.test
        return self._batches(EvalSampler(test, testing_augment(self.data, test), chunks, self.on_bad_sample), 0, 1)

    def _batches(self, sampler: Sampler, first_group: int, stride: int) -> Iterator[GhostBatch]:
        normalize = Normalize(
            self.source.mean,
            self.source.std,
            getattr(torch, self.data.dtype),
            self.data.channels_last,
            self.device,
        )
        kind = choose_pipeline(self.data.pipeline, sampler.samples)

        def inputs(first: int) -> Iterator[tuple[RawBatch, Tensor]]:
            if kind == "torch":
                return torch_inputs(sampler, normalize, first, stride)
            from hvd_batchgrow.data.pipeline.dali_pipeline import dali_inputs

            # On the CPU the calling thread is busy: it resizes and normalizes the images that DALI decoded.
            busy = 0 if self.device.type == "cuda" else 1
            return dali_inputs(sampler, normalize, first, stride, max(1, self.num_threads - busy))

        return batches(sampler, inputs, first_group, stride)


def batches(
    sampler: Sampler, inputs: Callable[[int], Iterator[tuple[RawBatch, Tensor]]], first_group: int, stride: int
) -> Iterator[GhostBatch]:
    """Yield the batches of a sampler. If a bad sample ends a pipeline, a new one continues from the same ghost batch.

    Args:
        sampler: replaces bad samples.
        inputs: opens a pipeline at a ghost batch.
        first_group: the first ghost batch.
        stride: from one ghost batch to the next.
    """
    group = first_group
    while True:
        try:
            for raw, values in inputs(group):
                group = raw.group + stride  # ranges without good samples are skipped
                labels = to_device(torch.from_numpy(raw.labels), values.device)
                yield GhostBatch(values, labels, raw.stream_index, raw.ids, raw.replaced)
            return
        except BadSample as bad:
            sampler.replace(bad)


def training_augment(data: DataSection, samples: Dataset) -> Augment | None:
    """Return the augmentation of training images; None for rows."""
    if samples.kind == "rows":
        return None
    if samples.kind == "images":
        height, width, _ = samples.shape
        return CropFlip((height, width), data.crop_padding, data.hflip)
    side = _crop_pixels(data)
    return ResizedCrop((side, side), data.crop_scale, data.crop_ratio, data.hflip)


def testing_augment(data: DataSection, samples: Dataset) -> Augment | None:
    """Return the crop of test images; None for rows."""
    if samples.kind == "rows":
        return None
    if samples.kind == "images":
        height, width, _ = samples.shape
        return CentreCrop((height, width), min(height, width))
    side = _crop_pixels(data)
    return CentreCrop((side, side), data.eval_resize or round(side * 8 / 7))


def _crop_pixels(data: DataSection) -> int:
    if data.image_size is None:
        fault = "is needed: encoded images are cropped and resized to a square with this side, in pixels; 224 is usual"
        raise JobError([Fault("data.image_size", fault)])
    return data.image_size


def choose_pipeline(requested: str, samples: Dataset) -> str:
    """Return "dali" or "torch", as the job requests; "auto" is DALI for encoded images and torch for arrays.

    On arrays of 32 × 32 images with one thread, torch is faster (measured in docs/data.md).

    Raises:
        JobError: DALI is requested for rows.
        RunError: DALI is requested and not installed.
    """
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if requested == "dali" and samples.kind == "rows":
        raise JobError([Fault("data.pipeline", "'dali' reads images, and these are rows; use 'auto' or 'torch'")])
    if requested == "dali" and not installed:
        raise RunError(
            "data.pipeline = 'dali', but DALI is not installed: pip install 'hvd_batchgrow[dali-cuda130]', "
            "or --data.pipeline torch, which gives the same pixels"
        )
    if requested != "auto":
        return requested
    return "dali" if installed and samples.kind == "encoded" else "torch"
