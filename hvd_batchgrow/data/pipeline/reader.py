"""From a sampler to batches: choose the pipeline, and handle bad samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.augment_checks import dali_fault, torch_only_keys
from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, Datasets, Ids
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.crops import Augment, CenterCrop, CropFlip, ResizedCrop
from hvd_batchgrow.data.pipeline.erasing import erase
from hvd_batchgrow.data.pipeline.mixing import Mixing
from hvd_batchgrow.data.pipeline.pixel_augment import pixel_augment
from hvd_batchgrow.data.pipeline.sampler import (
    EvalSampler,
    NumGhostBatches,
    OnBad,
    RawBatch,
    Sampler,
    TrainSampler,
    one_by_one,
)
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, torch_inputs
from hvd_batchgrow.data.source_checks import KIND_TEXT
from hvd_batchgrow.data.tensor_tree import Tree, device_of, moved, take_rows
from hvd_batchgrow.messages.errors import Fault, JobError, RunError


@dataclass(frozen=True)
class GhostBatches:
    """Consecutive ghost batches of a rank, or a part of a test set: n samples, as the network's inputs and targets."""

    inputs: Tree
    """(n, C, H, W), (n, features) or tokens (n, L); for a torch Dataset, a tree of tensors (n, …)."""
    targets: Tree
    """(n,) classes; with Mixup or CutMix float32 (n, C), probabilities of the classes; or other targets (n, …)."""
    stream_index: Ids
    """(n,) indices in the stream."""
    ids: Ids
    """(n,) sample ids."""
    replaced: NDArray[np.bool_]
    """(n,) whether the sample replaces a bad one of the stream."""

    def __getitem__(self, part: slice) -> GhostBatches:
        inputs, targets = take_rows(self.inputs, part), take_rows(self.targets, part)
        return GhostBatches(inputs, targets, self.stream_index[part], self.ids[part], self.replaced[part])


class GhostBatchStream:
    """The ghost batches of a rank, which are taken in any number.

    Args:
        batches: in the order of the stream, each with whole ghost batches.
        ghost_batch: γ.
    """

    def __init__(self, batches: Iterator[GhostBatches], ghost_batch: int) -> None:
        self._batches, self._ghost_batch = batches, ghost_batch
        self._rest: GhostBatches | None = None

    def take(self, count: int) -> list[GhostBatches]:
        """Return the next `count` ghost batches. They are one batch as it was read, unless it has another number."""
        parts, missing = [], count * self._ghost_batch
        while missing:
            batch = self._rest or next(self._batches)
            size = len(batch.ids)
            parts.append(batch if size <= missing else batch[:missing])
            self._rest = None if size <= missing else batch[missing:]
            missing -= len(parts[-1].ids)
        return parts


@dataclass(frozen=True)
class Reader:
    """How a job reads its samples on this rank.

    Args:
        data: the job's section.
        source: the samples.
        device: of the batches.
        num_threads: of this rank, including the calling thread.
        on_bad_sample: called before a bad sample is replaced in training.
        max_samples: the most samples of a batch.
        on_skipped_sample: called before a bad sample is skipped in testing; None: `on_bad_sample`.
    """

    data: DataSection
    source: Datasets
    device: torch.device
    num_threads: int
    on_bad_sample: OnBad
    max_samples: int
    on_skipped_sample: OnBad | None = None

    def training(
        self,
        stream: Stream,
        ghost_batch: int,
        first_ghost_batch: int,
        stride: int,
        num_ghost_batches: NumGhostBatches = one_by_one,
        *,
        keep_prefetched: bool = False,
    ) -> Iterator[GhostBatches]:
        """Yield batches of the ghost batches first_ghost_batch, first_ghost_batch + stride, …

        Args:
            stream: the order of the samples.
            ghost_batch: γ.
            first_ghost_batch: the first ghost batch.
            stride: from one ghost batch to the next.
            num_ghost_batches: of each batch.
            keep_prefetched: leave what is prefetched for training as it is, and use the pipeline for testing.

        Raises:
            BadSample, RunError: when the batch is the next to yield.
        """
        train = self.source.train
        augment = training_augment(self.data, train)
        if train.kind == "samples":  # the workers share the ghost batches among themselves
            num_ghost_batches = _at_most_one(num_ghost_batches)
        pixels = pixel_augment(self.data, augment.out_size) if augment else None
        sampler = TrainSampler(train, stream, augment, ghost_batch, self.on_bad_sample, num_ghost_batches, pixels)
        batches = self._batches(sampler, first_ghost_batch, stride, 1 if keep_prefetched else 0)
        mixing = mixing_of(self.data, stream.seed, ghost_batch, self.source.num_classes)
        return _mixed(batches, mixing) if mixing else batches

    def testing(self, chunks: Sequence[range], samples: Dataset | None = None) -> Iterator[GhostBatches]:
        """Yield the given ranges of a set, in order, without augmentation. Raises as `training`.

        Args:
            chunks: the ranges.
            samples: the set; None: the test set.
        """
        samples = self.source.test if samples is None else samples
        on_bad_sample = self.on_skipped_sample or self.on_bad_sample
        sampler = EvalSampler(samples, testing_augment(self.data, samples), chunks, on_bad_sample)
        return self._batches(sampler, 0, 1, 1)

    def _batches(self, sampler: Sampler, first_ghost_batch: int, stride: int, pipeline: int) -> Iterator[GhostBatches]:
        if choose_pipeline(self.data, sampler.samples) == "torch":
            normalize, num_threads = self._normalize, self.num_threads
            return batches(
                sampler, lambda first: torch_inputs(sampler, normalize, first, stride, num_threads), first_ghost_batch
            )
        dali = self._dali[pipeline]
        return batches(sampler, lambda first: dali.inputs(sampler, first, stride), first_ghost_batch)

    @cached_property
    def _normalize(self) -> Normalize:
        return Normalize(
            self.source.mean, self.source.std, getattr(torch, self.data.dtype), self.data.channels_last, self.device
        )

    @cached_property
    def _dali(self) -> tuple[Any, Any]:
        """A pipeline for training and one for testing, which last as long as the reader."""
        from hvd_batchgrow.data.pipeline.dali_pipeline import DaliPipeline

        training, testing = (DaliPipeline(self._normalize, self.max_samples, self.num_threads) for _ in range(2))
        return training, testing


def _at_most_one(num_ghost_batches: NumGhostBatches) -> NumGhostBatches:
    return lambda index: min(1, num_ghost_batches(index))


def batches(
    sampler: Sampler, inputs: Callable[[int], Iterator[tuple[RawBatch, Tree]]], first_ghost_batch: int
) -> Iterator[GhostBatches]:
    """Yield the batches of a sampler. If a bad sample ends a pipeline, a new one continues from the same ghost batch.

    Args:
        sampler: replaces bad samples.
        inputs: opens a pipeline at a ghost batch.
        first_ghost_batch: the first ghost batch.
    """
    index = first_ghost_batch
    while True:
        try:
            for raw, values in inputs(index):
                index = raw.next_ghost_batch  # ranges without good samples are skipped
                if raw.pixel_params and raw.pixel_params.rectangles is not None:
                    erase(values, raw.pixel_params.rectangles)
                on_host = torch.from_numpy(raw.targets) if isinstance(raw.targets, np.ndarray) else raw.targets
                targets = moved(on_host, device_of(values))
                yield GhostBatches(values, targets, raw.stream_index, raw.ids, raw.replaced)
            return
        except BadSample as bad:
            sampler.replace(bad)


def mixing_of(data: DataSection, seed: int, ghost_batch: int, num_classes: int) -> Mixing | None:
    """Return the job's rule for Mixup and CutMix; None: samples are not mixed."""
    if not data.mixes_samples:
        return None
    alphas = data.mixup_alpha, data.cutmix_alpha
    return Mixing(*alphas, data.mixup_prob, data.mixup_switch_prob, seed, ghost_batch, num_classes)


def _mixed(batches: Iterator[GhostBatches], mixing: Mixing) -> Iterator[GhostBatches]:
    """Yield the batches with their ghost batches mixed. Raises JobError if their targets are not classes."""
    for batch in batches:
        if batch.targets.ndim != 1 or batch.targets.dtype != torch.int64:
            key = "data.mixup_alpha" if mixing.mixup_alpha else "data.cutmix_alpha"
            found = f"{batch.targets.dtype} {tuple(batch.targets.shape)}"
            fault = f"mixes classes, int64 (n,), and the targets of this source are {found}; set it to 0"
            raise JobError([Fault(key, fault)])
        indices = (batch.stream_index[:: mixing.ghost_batch] // mixing.ghost_batch).tolist()
        yield replace(batch, targets=mixing.mix(batch.inputs, batch.targets, indices))


def training_augment(data: DataSection, samples: Dataset) -> Augment | None:
    """Return the augmentation of training images; None for samples that are not images."""
    if samples.kind not in {"images", "encoded"}:
        return None
    if samples.kind == "images":
        height, width, _ = samples.shape
        return CropFlip((height, width), data.crop_padding, data.hflip)
    side = _crop_pixels(data)
    return ResizedCrop((side, side), data.crop_scale, data.crop_ratio, data.hflip)


def testing_augment(data: DataSection, samples: Dataset) -> Augment | None:
    """Return the crop of test images; None for samples that are not images."""
    if samples.kind not in {"images", "encoded"}:
        return None
    if samples.kind == "images":
        height, width, _ = samples.shape
        return CenterCrop((height, width), min(height, width))
    side = _crop_pixels(data)
    return CenterCrop((side, side), data.eval_resize or round(side * 8 / 7))


def _crop_pixels(data: DataSection) -> int:
    if data.image_size is None:
        fault = "is needed: encoded images are cropped and resized to a square with this side, in pixels; 224 is usual"
        raise JobError([Fault("data.image_size", fault)])
    return data.image_size


def choose_pipeline(data: DataSection, samples: Dataset) -> str:
    """Return "dali" or "torch", as the job requests; "auto" is DALI for encoded images and torch for arrays.

    On arrays of 32 × 32 images with one thread, torch is faster (measured in docs/data.md). With an augmentation that
    only the pipeline `torch` has, "auto" is torch.

    Raises:
        JobError: DALI is requested for samples that are not images, or for an augmentation that it does not have.
        RunError: DALI is requested and not installed.
    """
    requested, torch_only = data.pipeline, torch_only_keys(data)
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if requested == "dali" and samples.kind not in {"images", "encoded"}:
        these = KIND_TEXT[samples.kind]
        raise JobError([Fault("data.pipeline", f"'dali' reads images, and these are {these}; use 'auto' or 'torch'")])
    if requested == "dali" and torch_only:
        raise JobError([dali_fault(torch_only)])
    if requested == "dali" and not installed:
        raise RunError(
            "data.pipeline = 'dali', but DALI is not installed: pip install 'hvd_batchgrow[dali-cuda130]', "
            "or --data.pipeline torch, which gives the same pixels as DALI on a CPU"
        )
    if requested != "auto":
        return requested
    return "dali" if installed and samples.kind == "encoded" and not torch_only else "torch"
