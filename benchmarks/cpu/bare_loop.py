"""The training loop that a user would write by hand: images in memory, accumulated gradients, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from hvd_batchgrow.data.datasets.dataset import Datasets

Images = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From sample ids (n,) to images (n, C, H, W) and labels (n,)."""


def augmented(source: Datasets, padding: int, *, channels_last: bool = False) -> Images:
    """Return a function that crops, mirrors and normalizes training images as one tensor.

    Args:
        source: of images in memory.
        padding: pixels on each side of the image from which it is cropped.
        channels_last: memory format of the images; otherwise they are contiguous, as those of a DataLoader are.
    """
    every = np.arange(len(source.train))
    pixels = torch.from_numpy(source.train.fetch(every)).permute(0, 3, 1, 2)
    side = pixels.shape[-1]
    padded = nn.functional.pad(pixels, (padding,) * 4)
    labels = torch.from_numpy(source.train.targets[every])
    mean, std = (255 * torch.tensor(values).reshape(1, -1, 1, 1) for values in (source.mean, source.std))
    span = torch.arange(side)

    def load(ids: Tensor) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 2 * padding + 1, (2, len(ids), 1))
        columns = torch.where(torch.rand(len(ids), 1) < 0.5, side - 1 - span, span) + left
        rows = top + span
        crops = padded.permute(0, 2, 3, 1)[ids[:, None, None], rows[:, :, None], columns[:, None, :]]
        images = crops.permute(0, 3, 1, 2).float().sub_(mean).div_(std)
        return images if channels_last else images.clone(memory_format=torch.contiguous_format), labels[ids]

    return load


def shuffled(num_samples: int, batch: int) -> Iterator[Tensor]:
    """Yield the sample ids of each update, without end; each epoch has another order."""
    while True:
        yield from torch.randperm(num_samples)[: num_samples // batch * batch].split(batch)


def accumulating(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    load: Images,
    ids: Iterator[Tensor],
    micro_batch: int,
    num_updates: int,
    without_sum: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[], None]:
    """Return a function that does some updates, each of which accumulates the gradients of micro-batches.

    Args:
        network: with nn.BatchNorm2d.
        optimizer: of its parameters.
        load: returns the images and labels of sample ids.
        ids: the sample ids of this rank in each update.
        micro_batch: samples of a micro-batch.
        num_updates: updates per call.
        without_sum: context of all backward passes but the last, such as `DistributedDataParallel.no_sync`.
    """
    network.train()

    def work() -> None:
        for _ in range(num_updates):
            parts = next(ids).split(micro_batch)
            for part in parts:
                images, labels = load(part)
                with nullcontext() if part is parts[-1] else without_sum():
                    (nn.functional.cross_entropy(network(images), labels) / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return work
