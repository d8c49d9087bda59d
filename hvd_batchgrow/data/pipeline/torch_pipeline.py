"""The reference pipeline: vectorized NumPy and torch in the training process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.data.pipeline.crops import CropParams
from hvd_batchgrow.data.pipeline.pixel_augment import PixelParams
from hvd_batchgrow.data.pipeline.sampler import RawBatch, Sampler
from hvd_batchgrow.data.pipeline.windows import decoded_window, finished_ahead, finished_window
from hvd_batchgrow.data.tensor_tree import Tree, moved

_CPU = torch.device("cpu")
_CACHED_PIXELS = 1 << 18


@dataclass(frozen=True)
class Normalize:
    """The last stage of every pipeline: (pixel/255 - mean) / std per channel, in the network's dtype and memory format.

    For rows: (value - mean) / std per feature, in float64 up to the final conversion. In float32, a time stamp of
    1.7e9 s would be rounded to 128 s before the mean is subtracted.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    device: torch.device = _CPU

    def images(self, pixels: Tensor) -> Tensor:
        """Normalize uint8 (n, H, W, C) to (n, C, H, W), on the device."""
        pixels = (to_device(pixels, self.device)).permute(0, 3, 1, 2)
        result = self.empty(pixels.shape, self.device)
        # On the CPU, in parts that fit into a core's cache.
        length = len(pixels) if self.device.type != "cpu" else max(1, _CACHED_PIXELS // pixels[:1].numel())
        for start in range(0, len(pixels), length):
            part = slice(start, start + length)
            self.normalize_into(result[part], pixels[part])
        return result

    def empty(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
        """Allocate images of a shape (n, C, H, W)."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=form)

    def normalize_into(self, result: Tensor, pixels: Tensor) -> None:
        """Normalize uint8 (n, C, H, W) into a tensor of the same shape and device."""
        scale, shift = self._constants[pixels.device]
        values = result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
        values.copy_(pixels)
        values.mul_(scale).add_(shift)
        if values is not result:
            result.copy_(values)

    def rows(self, values: Tensor) -> Tensor:
        """Standardize (n, features), float32 or float64, and convert to the network's dtype."""
        mean, std = self._moments
        return to_device(values.double().sub(mean).div_(std).to(self.dtype), self.device)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64."""
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)

    @cached_property
    def _constants(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """1/(255 std) and -mean/std, each (C, 1, 1), on each device."""
        scale = [1 / (255 * d) for d in self.std]
        shift = [-m / d for m, d in zip(self.mean, self.std, strict=True)]
        on_host = [torch.tensor(c, dtype=torch.float32).view(-1, 1, 1) for c in (scale, shift)]
        return {device: tuple(c.to(device) for c in on_host) for device in {_CPU, self.device}}  # type: ignore[misc]


def torch_inputs(
    sampler: Sampler, normalize: Normalize, first_ghost_batch: int, stride: int, num_threads: int = 1
) -> Iterator[tuple[RawBatch, Tree]]:
    """Yield the batches of a sampler and the network's inputs. Raises BadSample when one is read.

    Args:
        sampler: gives the batches.
        normalize: the last stage; its device is that of the inputs.
        first_ghost_batch: the first ghost batch.
        stride: from one ghost batch to the next.
        num_threads: that decode images. With 1 thread on a CPU, the calling one decodes; otherwise threads decode the
            next batches while one is trained on.
    """
    raws, samples = sampler.raw_batches(first_ghost_batch, stride), sampler.samples
    if samples.kind == "encoded" and (num_threads > 1 or normalize.device.type != "cpu"):
        for raw, images in finished_ahead(samples, raws, num_threads):
            yield raw, normalize.images(torch.from_numpy(images))
        return
    for raw in raws:
        if samples.kind in {"samples", "tokens"}:
            values = torch.from_numpy(raw.values) if isinstance(raw.values, np.ndarray) else raw.values
            yield raw, moved(values, normalize.device)
        elif raw.placement is None:
            yield raw, normalize.rows(torch.from_numpy(raw.values))
        elif samples.kind == "encoded":
            windows = (decoded_window(raw, samples, k) for k in range(len(raw.ids)))
            yield raw, normalize_windows(windows, raw.placement, normalize, raw.pixel_params)
        else:
            images = cut_and_mirror(raw.values, raw.placement)
            if raw.pixel_params:
                for k, image in enumerate(images):
                    image[...] = raw.pixel_params.alter(image, k)
            yield raw, normalize.images(torch.from_numpy(images))


def cut_and_mirror(images: NDArray[np.uint8], placement: CropParams) -> NDArray[np.uint8]:
    """Cut out each image's window, with zeros beyond the edges, and mirror it.

    Args:
        images: (n, H, W, C).
        placement: windows of one size, not resized.

    Returns:
        (n, h, w, C).
    """
    n, height, width, channels = images.shape
    (out_height, out_width), corners = placement.out_size, placement.windows[:, :2]
    # Pad for the farthest window on every side.
    low = np.minimum(corners.min(axis=0), 0)
    end = np.maximum(corners.max(axis=0) + placement.out_size, (height, width))
    padded = np.zeros((n, *(end - low), channels), dtype=np.uint8)
    padded[:, -low[0] : height - low[0], -low[1] : width - low[1]] = images
    # A view of all windows of an image: indexing it copies whole rows, not pixels.
    strides = padded.strides
    positions = (padded.shape[1] - out_height + 1, padded.shape[2] - out_width + 1)
    windows = as_strided(padded, (n, *positions, out_height, out_width, channels), strides[:3] + strides[1:])
    result = windows[np.arange(n), *(corners - low).T]
    mirrored = np.flatnonzero(placement.mirrors)
    result[mirrored] = result[mirrored, :, ::-1]
    return result  # type: ignore[no-any-return]


def normalize_windows(
    windows: Iterable[Tensor], placement: CropParams, normalize: Normalize, pixels: PixelParams | None = None
) -> Tensor:
    """Finish and normalize decoded windows one by one, so that each stays in the CPU's cache.

    Args:
        windows: n windows, uint8 (height, width, C).
        placement: of the same images.
        normalize: the last stage.
        pixels: how the images are altered; None: not at all.

    Returns:
        (n, C, h, w) on the device.
    """
    shape = len(placement.windows), len(normalize.mean), *placement.out_size
    result = normalize.empty(shape, _CPU)
    for k, window in enumerate(windows):
        image = finished_window(window, placement, k, pixels)
        normalize.normalize_into(result[k : k + 1], image.permute(2, 0, 1)[None])
    return to_device(result, normalize.device)
