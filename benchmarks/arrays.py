"""Measure images/s on one thread for images in memory: crop with padding, mirror, normalize to float32.

python -m benchmarks.arrays [--turns 7] [--side 32] [--channels 3]

The contestants are this package's pipelines; a hand-written gather of single pixels from one flat, padded torch
tensor; DALI with the same crops; and torch's DataLoader over a dataset that returns one image at a time. DALI computes
in one thread beside this one, and begins a turn with up to two of its 40 batches prefetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.turns import print_rates, take_turns
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets, raise_bad
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.reader import Reader

NUM_SAMPLES, BATCH, BATCHES, PAD = 50_000, 256, 40, 4
MEAN, DEVIATION = 0.5, 0.25
REFERENCE = "flat torch gather"


def gather(padded: Tensor, side: int, channels: int) -> Iterator[Tensor]:
    """Yield batches gathered pixel by pixel from the flat, padded set."""
    flat, wide = padded.reshape(-1), side + 2 * PAD
    span, channel = torch.arange(side), torch.arange(channels)
    order = torch.randperm(NUM_SAMPLES)
    for ids in order.split(BATCH):
        corners = torch.randint(0, 2 * PAD + 1, (2, len(ids), 1))
        mirrored = torch.rand(len(ids), 1) < 0.5
        columns = torch.where(mirrored, side - 1 - span, span) + corners[1]
        rows = ids[:, None] * wide + corners[0] + span
        places = (rows[:, None, :, None] * wide + columns[:, None, None, :]) * channels + channel[:, None, None]
        yield flat.take(places).float().mul_(1 / (255 * DEVIATION)).sub_(MEAN / DEVIATION)


class OneByOne(Dataset[Tensor]):
    """A dataset that pads, crops, mirrors and normalizes one image, like those of torchvision."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        side = self.images.shape[1]
        image = torch.nn.functional.pad(self.images[index].permute(2, 0, 1), (PAD,) * 4)
        top, left = torch.randint(0, 2 * PAD + 1, (2,)).tolist()
        image = image[:, top : top + side, left : left + side]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return image.float().div(255).sub_(MEAN).div_(DEVIATION)


def ours(samples: ArrayDataset, pipeline: str, channels: int) -> Iterator[Tensor]:
    """Return the batches that the trainer uses."""
    data = DataSection(source="numpy", crop_padding=PAD, hflip=True, pipeline=pipeline)  # type: ignore[arg-type]
    source = Datasets(samples, samples, 10, (MEAN,) * channels, (DEVIATION,) * channels)
    reader = Reader(data, source, torch.device("cpu"), 1, raise_bad, BATCH)
    return (batch.inputs for batch in reader.training(Stream(NUM_SAMPLES, 0), BATCH, 0, 1))


def contestant(start: Callable[[], Iterator[Tensor]]) -> Callable[[], int]:
    """Return a contestant that takes some batches of an iterator and continues with it in the next turn."""
    batches = start()

    def take() -> int:
        nonlocal batches
        done = sum(len(images) for images in islice(batches, BATCHES))
        if done < BATCH * BATCHES:  # the epoch is over
            batches = start()
        return done

    return take


def contestants(side: int, channels: int) -> dict[str, Callable[[], int]]:
    """Return the contestants for images of a size."""
    images = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, side, side, channels), dtype=np.uint8)
    padded = torch.from_numpy(np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))))
    samples = ArrayDataset(images, np.zeros(NUM_SAMPLES, dtype=np.int64))
    one_by_one = DataLoader(OneByOne(torch.from_numpy(images)), BATCH, shuffle=True)
    return {
        REFERENCE: contestant(lambda: gather(padded, side, channels)),
        "hvd_batchgrow, torch": contestant(lambda: ours(samples, "torch", channels)),
        "hvd_batchgrow, DALI": contestant(lambda: ours(samples, "dali", channels)),
        "torch DataLoader": contestant(lambda: iter(one_by_one)),
    }


def main() -> None:
    """Time the contestants in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates = take_turns(contestants(arguments.side, arguments.channels), arguments.turns)
    print_rates(rates, "images/s", REFERENCE)


if __name__ == "__main__":
    main()
