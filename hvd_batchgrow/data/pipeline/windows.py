"""From an encoded image to the pixels of the network's input: decode its window, resize, crop, mirror and alter it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.data.datasets.dataset import Dataset
from hvd_batchgrow.data.images.encoded_dataset import decode
from hvd_batchgrow.data.pipeline.crops import CropParams
from hvd_batchgrow.data.pipeline.pixel_augment import PixelParams
from hvd_batchgrow.data.pipeline.sampler import RawBatch
from hvd_batchgrow.messages.errors import RunError

_AHEAD = 2
"""Batches that are decoded ahead of the current one; DALI prefetches as many."""


def decoded_window(raw: RawBatch, samples: Dataset, k: int) -> Tensor:
    """Return the window of image k of a batch, uint8 (height, width, 3), decoded by Pillow. Raises BadSample."""
    assert raw.placement is not None
    top, left, height, width = raw.placement.windows[k].tolist()
    pixels = decode(samples, int(raw.ids[k]), raw.values[k])[top : top + height, left : left + width]
    return torch.from_numpy(np.array(pixels))  # a copy, as torch requires writable memory


def finished_window(window: Tensor, placement: CropParams, k: int, pixels: PixelParams | None) -> Tensor:
    """Resize, crop, mirror and alter the window of image k.

    torch's antialiased bilinear filter resizes uint8 to uint8, as torchvision does for tensors.

    Args:
        window: uint8 (height, width, C).
        placement: of the images.
        k: index of this image among them.
        pixels: how the images are altered; None: not at all.

    Returns:
        uint8 (h, w, C), in any memory layout; perhaps a part of the window.
    """
    size, (row, column) = placement.resized[k].tolist(), placement.corners[k].tolist()
    if list(window.shape[:2]) != size:
        image = window.permute(2, 0, 1)[None]
        window = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    height, width = placement.out_size
    result = window[row : row + height, column : column + width]
    result = result.flip(1) if placement.mirrors[k] else result
    return torch.from_numpy(np.array(pixels.alter(result.numpy(), k))) if pixels else result


def finished_ahead(
    samples: Dataset, batches: Iterator[RawBatch], num_threads: int
) -> Iterator[tuple[RawBatch, NDArray[np.uint8]]]:
    """Yield batches and their images, uint8 (n, h, w, 3), while threads decode and alter the next batches.

    Args:
        samples: encoded samples.
        batches: with the bytes of their images.
        num_threads: that decode; each image is the work of one thread, so its pixels do not depend on their number.

    Raises:
        BadSample: when its batch is the next to yield.
    """
    waiting: deque[tuple[RawBatch, NDArray[np.uint8], list[Future[None]]]] = deque()
    pool = ThreadPoolExecutor(num_threads, "decode")

    def finish(raw: RawBatch, images: NDArray[np.uint8], k: int) -> None:
        assert raw.placement is not None
        images[k] = finished_window(decoded_window(raw, samples, k), raw.placement, k, raw.pixel_params).numpy()

    def start() -> bool:
        """Start to decode the next batch; return False if there is no other one."""
        raw = next(batches, None)
        if raw is None:
            return False
        assert raw.placement is not None
        # Channels first in memory, like the windows that torch has resized and the network's input.
        images: NDArray[np.uint8] = np.empty((len(raw.ids), 3, *raw.placement.out_size), np.uint8).transpose(0, 2, 3, 1)
        waiting.append((raw, images, [pool.submit(finish, raw, images, k) for k in range(len(images))]))
        return True

    fault: RunError | None = None
    try:
        while True:
            try:
                while fault is None and len(waiting) <= _AHEAD and start():
                    pass
            except RunError as error:  # a later batch cannot be read: those before it are delivered first
                fault = error
            if not waiting:
                break
            yield _waited_for(*waiting.popleft())
        if fault:
            raise fault
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _waited_for(
    raw: RawBatch, images: NDArray[np.uint8], work: list[Future[None]]
) -> tuple[RawBatch, NDArray[np.uint8]]:
    for image in work:
        image.result()
    return raw, images
