"""Pipelines: from the stream's groups to tensors. Every pipeline gives the same pixels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.augment import CropFlip
from hvd_batchgrow.data.sources import ImageSet, Source
from hvd_batchgrow.data.stream import Stream, sample_draws
from hvd_batchgrow.errors import RunError


@dataclass(frozen=True)
class RawGroup:
    """What a pipeline is fed: the samples of one group, and what their draws decided."""

    images: NDArray[np.uint8]
    """(γ, H, W, C)."""
    corners: NDArray[np.int32]
    """(γ, 2), see `CropFlip.place`."""
    mirrors: NDArray[np.int32]
    """(γ,)."""
    labels: NDArray[np.int64]
    """(γ,)."""


class GroupFeed:
    """The groups of one rank, in stream order: first_group, first_group + stride, … without an end."""

    def __init__(self, images: ImageSet, stream: Stream, augment: CropFlip, group: int) -> None:
        self.images = images
        self.stream = stream
        self.augment = augment
        self.group = group

    def raw_group(self, k: int) -> RawGroup:
        """Group k of the stream: entries kγ … (k+1)γ - 1."""
        epochs, ids = self.stream.entries(k * self.group, (k + 1) * self.group)
        draws = sample_draws(self.stream.seed, epochs, ids, self.augment.num_draws)
        corners, mirrors = self.augment.place(draws)
        return RawGroup(self.images.images[ids], corners, mirrors, self.images.labels[ids])

    def raw_groups(self, first_group: int, stride: int) -> Iterator[RawGroup]:
        """Groups first_group, first_group + stride, …"""
        k = first_group
        while True:
            yield self.raw_group(k)
            k += stride


@dataclass(frozen=True)
class Normalisation:
    """(pixel/255 - mean) / deviation, per channel."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """(n, H, W, C) uint8 to (n, C, H, W) float32."""
        scale = torch.tensor([1 / (255 * d) for d in self.deviation], dtype=torch.float32)
        shift = torch.tensor([-m / d for m, d in zip(self.mean, self.deviation, strict=True)], dtype=torch.float32)
        return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2).contiguous()


Batch = tuple[Tensor, Tensor]
"""Images float32 (n, C, H, W) and labels int64 (n,)."""


def torch_batches(feed: GroupFeed, normalise: Normalisation, first_group: int, stride: int) -> Iterator[Batch]:
    """The reference: each group by vectorised NumPy and torch."""
    for raw in feed.raw_groups(first_group, stride):
        pixels = torch.from_numpy(crop_and_mirror(raw, feed.augment.pad_pixels))
        yield normalise(pixels), torch.from_numpy(raw.labels)


def crop_and_mirror(raw: RawGroup, pad_pixels: int) -> NDArray[np.uint8]:
    """The uint8 stage of a group: zeros around, crop of the image's size, mirror. Shape as the images'."""
    n, height, width, _ = raw.images.shape
    padded = np.pad(raw.images, ((0, 0), (pad_pixels, pad_pixels), (pad_pixels, pad_pixels), (0, 0)))
    rows = raw.corners[:, :1] + pad_pixels + np.arange(height)
    columns = raw.corners[:, 1:] + pad_pixels + np.arange(width)
    columns = np.where(raw.mirrors[:, None] == 1, columns[:, ::-1], columns)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]  # type: ignore[no-any-return]


def dali_batches(feed: GroupFeed, normalise: Normalisation, first_group: int, stride: int) -> Iterator[Batch]:
    """The same groups through a DALI pipeline on the CPU, read ahead by its own queue.

    DALI crops and mirrors bytes; both pipelines normalise by the same code, so that they agree to the bit.
    """
    pipeline = _dali_pipeline(feed, first_group, stride)
    pipeline.build()
    while True:
        images, labels = (torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in pipeline.run())
        # The outputs lie in DALI's own buffers, which the next run overwrites: neither may be a view of them.
        yield normalise(images), labels.flatten().clone()


def _dali_pipeline(feed: GroupFeed, first_group: int, stride: int) -> Any:
    from nvidia.dali import fn, pipeline_def

    raw_groups = feed.raw_groups(first_group, stride)
    height, width = feed.images.images.shape[1:3]

    def next_group() -> tuple[NDArray[Any], ...]:
        raw = next(raw_groups)
        return raw.images, raw.corners, raw.mirrors, raw.labels

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=feed.group, num_threads=1, device_id=None, prefetch_queue_depth=2
    )
    def definition() -> tuple[Any, Any]:
        images, corners, mirrors, labels = fn.external_source(
            source=next_group, num_outputs=4, batch=True, layout=["HWC", "", "", ""]
        )
        images = fn.slice(
            images,
            start=corners,
            shape=[height, width],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
        return fn.flip(images, horizontal=mirrors), labels

    return definition()


def choose_pipeline(asked: str) -> str:
    """ "dali" or "torch": what a job asks for, `auto` being DALI where it is installed.

    Raises:
        RunError: DALI is asked for and missing.
    """
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if asked == "dali" and not installed:
        raise RunError(
            "data.pipeline = 'dali', but DALI is not installed: pip install 'hvd_batchgrow[dali-cuda130]', "
            "or --data.pipeline torch, which gives the same pixels"
        )
    return asked if asked != "auto" else "dali" if installed else "torch"


def open_pipeline(
    job: DataSection, source: Source, stream: Stream, group: int, first_group: int, stride: int
) -> Iterator[Batch]:
    """Training groups first_group, first_group + stride, … as a job wants them. Raises as `choose_pipeline`."""
    feed = GroupFeed(source.train, stream, CropFlip(job.pad_pixels, job.flip), group)
    batches = {"dali": dali_batches, "torch": torch_batches}[choose_pipeline(job.pipeline)]
    return batches(feed, Normalisation(source.mean, source.deviation), first_group, stride)


def evaluation_batches(images: ImageSet, normalise: Normalisation, chunks: Sequence[slice]) -> Iterator[Batch]:
    """The given slices of a set, in order, without augmentation."""
    for chunk in chunks:
        yield normalise(torch.from_numpy(images.images[chunk])), torch.from_numpy(images.labels[chunk])
