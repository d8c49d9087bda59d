"""A torch Dataset of the images that make_data.py drew, augmented by torchvision's RandAugment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2


class Shapes(Dataset[tuple[Tensor, int]]):
    """The images of one file, each transformed whenever it is read."""

    classes = ("disc", "square", "cross")

    def __init__(self, file: Path, transform: Callable[[Tensor], Tensor]) -> None:
        with np.load(file) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(torch.from_numpy(self.images[index])), int(self.labels[index])


def shapes(data: Any) -> tuple[Shapes, Shapes, Shapes]:
    """Return the training, validation and test set below `data.root`. Only training images are augmented.

    RandAugment draws from torch's global generator, which is seeded for each sample from seed, epoch and sample id.
    """
    plain = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.3] * 3)])
    augmented = v2.Compose([v2.RandAugment(), v2.RandomHorizontalFlip(), plain])
    root = Path(data.root)
    return Shapes(root / "train.npz", augmented), Shapes(root / "val.npz", plain), Shapes(root / "test.npz", plain)
