"""Measure images/s on one thread with each augmentation, for images in memory: crop, mirror, augment, normalize.

python -m benchmarks.augmentation [--turns 7] [--side 32]

The contestants are the reader with one key of `[data]` each, and without any; and torchvision's RandAugment on PIL
images, with its crop, mirror and normalization, one image at a time.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.turns import print_rates, take_turns
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets, raise_bad
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.torchvision_shim import import_torchvision

NUM_SAMPLES, BATCH, PAD = 2048, 128, 4
MEAN, DEVIATION = (0.5,) * 3, (0.25,) * 3
KEYS: dict[str, dict[str, Any]] = {
    "no augmentation but the crop": {},
    "randaugment": {"auto_augment": "randaugment"},
    "trivialaugment_wide": {"auto_augment": "trivialaugment_wide"},
    "color_jitter": {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
    "random_erasing": {"random_erasing": 0.25},
    "mixup_alpha": {"mixup_alpha": 0.2},
    "cutmix_alpha": {"cutmix_alpha": 1.0},
}


def ours(samples: ArrayDataset, keys: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the batches that the trainer uses."""
    data = DataSection(source="numpy", crop_padding=PAD, hflip=True, pipeline="torch", **keys)
    source = Datasets(samples, samples, 10, MEAN, DEVIATION)
    reader = Reader(data, source, torch.device("cpu"), 1, raise_bad, BATCH)
    return (batch.inputs for batch in reader.training(Stream(NUM_SAMPLES, 0), BATCH, 0, 1))


def torchvisions(samples: ArrayDataset, side: int) -> Iterator[Tensor]:
    """Yield batches of images that torchvision's transforms of PIL images make one by one, as in its reference."""
    import_torchvision()
    t = importlib.import_module("torchvision.transforms")
    transform = t.Compose(
        [
            t.RandomCrop(side, PAD),
            t.RandomHorizontalFlip(),
            t.RandAugment(),
            t.ToTensor(),
            t.Normalize(MEAN, DEVIATION),
        ]
    )
    while True:
        for ids in torch.randperm(NUM_SAMPLES).split(BATCH):
            yield torch.stack([transform(Image.fromarray(image)) for image in samples.values[ids.numpy()]])


def contestant(batches: Iterator[Tensor], num_batches: int) -> Callable[[], int]:
    """Return a contestant that takes some batches in each turn."""
    return lambda: sum(len(images) for images in islice(batches, num_batches))


def main() -> None:
    """Time the contestants in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--side", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    side = arguments.side
    coarse = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, side // 8, side // 8, 3), dtype=np.uint8)
    values = np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in coarse])
    samples = ArrayDataset(values, np.arange(NUM_SAMPLES) % 10)
    num_batches = max(1, 8 * 32 * 32 // side**2)
    contestants = {name: contestant(ours(samples, keys), num_batches) for name, keys in KEYS.items()}
    contestants["torchvision's RandAugment"] = contestant(torchvisions(samples, side), num_batches)
    print_rates(take_turns(contestants, arguments.turns), "images/s", next(iter(KEYS)))


if __name__ == "__main__":
    main()
