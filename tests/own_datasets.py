"""Sources and networks of a user, as `module:name` of jobs in tests; worker processes import this file too."""

from __future__ import annotations

import importlib.util
import os
import random
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.torchvision_shim import import_torchvision

NUM_TRAIN, NUM_VALIDATION, NUM_TEST, SIDE, LENGTH = 120, 30, 40, 12, 6


class Pictures(Dataset[tuple[Tensor, int]]):
    """Noisy prototypes of three classes."""

    classes = ("cat", "dog", "owl")

    def __init__(self, size: int, seed: int, transform: Callable[[Tensor], Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        prototypes = torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
        self.labels = torch.randint(0, 3, (size,), generator=generator)
        noise = torch.randint(-60, 60, (size, 3, SIDE, SIDE), generator=generator)
        self.images = (prototypes[self.labels] + noise).clamp(0, 255).to(torch.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def transforms() -> Any:
    """Import torchvision's transforms. This takes a second, which most processes that import this module can save."""
    import_torchvision()
    return importlib.import_module("torchvision.transforms.v2")


@cache
def to_floats() -> Any:
    return transforms().ToDtype(torch.float32, scale=True)


@cache
def augmented() -> Any:
    v2 = transforms()
    return v2.Compose([v2.RandAugment(), v2.ColorJitter(0.3, 0.3), v2.RandomResizedCrop(SIDE), to_floats()])


def pictures(data: DataSection) -> Any:
    return Pictures(NUM_TRAIN, 5, augmented()), Pictures(NUM_TEST, 6, to_floats())


def divided(data: DataSection) -> Any:
    """Divide by torch's global generator, as a user may who forgets the generator."""
    found = torch.utils.data.random_split(Pictures(NUM_TRAIN, 5, to_floats()), [NUM_TRAIN - 20, 20])
    for part in found:
        part.classes = Pictures.classes  # type: ignore[attr-defined]
    return found


def unseeded(data: DataSection) -> Any:
    """Return rows in an order that differs between processes."""
    order = np.random.default_rng().permutation(NUM_TRAIN)
    rows = order[:, None] * np.ones((1, 3), dtype=np.float32)
    samples = ArrayDataset(rows, order % 3)
    return Datasets(samples, samples, 3, (0.0,) * 3, (1.0,) * 3)


def three_sets(data: DataSection) -> Any:
    return (
        Pictures(NUM_TRAIN, 5, augmented()),
        Pictures(NUM_VALIDATION, 7, to_floats()),
        Pictures(NUM_TEST, 6, to_floats()),
    )


def one_set(data: DataSection) -> Any:
    return Pictures(NUM_TRAIN, 5, augmented())


class Trees(Dataset[dict[str, Any]]):
    """Numbers of several types, with random parts from all three global generators."""

    num_classes = 4

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = [random.random(), float(np.random.random()), torch.rand(()).item()]  # noqa: S311
        ids = np.random.default_rng(index).integers(0, 9, LENGTH)
        pair = (torch.tensor(drawn), np.float32(index))
        return {"ids": ids, "mask": ids > 3, "parts": {"pair": pair}, "label": int(ids.sum()) % 4}


def trees(data: DataSection) -> Any:
    return Trees(NUM_TRAIN), Trees(NUM_TEST)


class Tokens(Dataset[tuple[Tensor, int]]):
    """Integers alone."""

    def __len__(self) -> int:
        return NUM_TRAIN

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        ids = torch.randint(0, 9, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return ids, int(ids.sum()) % 4


def tokens(data: DataSection) -> Any:
    return Tokens(), Tokens()


class Summed(Trees):
    """Adds many numbers, which torch divides among its threads."""

    def __getitem__(self, index: int) -> Any:
        return torch.rand(1 << 20).sqrt().sum()[None], 0


def summed(data: DataSection) -> Any:
    return Summed(8), Summed(8)


class TreeNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 5), nn.BatchNorm1d(9), nn.Linear(9, num_classes)

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        first, second = inputs["parts"]["pair"]
        assert inputs["ids"].dtype == torch.int64
        assert inputs["mask"].dtype == torch.bool
        assert first.dtype == second.dtype == torch.float32
        words = (self.embed(inputs["ids"]) * inputs["mask"][:, :, None]).mean(1)
        logits: Tensor = self.head(self.norm(torch.cat([words, first, second[:, None] / NUM_TRAIN], 1)))
        return logits


class TokenNet(nn.Module):
    def __init__(self, num_classes: int, *, mixing: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.mixing = nn.Embedding(9, 5), nn.Linear(5, num_classes), mixing

    def forward(self, ids: Tensor) -> Tensor:
        words = self.embed(ids).mean(1)
        logits: Tensor = self.head(words - words.mean(0) if self.mixing else words)
        return logits


_NOTHING: dict[str, Any] = {}


class Broken(Trees):
    """A Dataset with one fault."""

    def __init__(self, size: int, fault: str) -> None:
        super().__init__(size)
        self.fault = fault
        self.own = np.random.default_rng(0)
        self.count = 0
        self.lock = threading.Lock() if fault == "lock" else None  # it cannot be pickled

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        x = torch.zeros(3)
        cases: dict[str, Callable[[], Any]] = {
            "own generator": lambda: (x + self.own.random(), 0),
            "counter": lambda: (x + self.count, 0),
            "rare": lambda: (x + (self.own.random() if index == self.size - 1 else 0), 0),
            "raises": lambda: (x, 0) if index != 17 else _NOTHING["key"],
            "shape": lambda: (torch.zeros(3 + index % 3), 0),
            "other form": lambda: (torch.zeros(4 if index == 17 else 3), 0),
            "class": lambda: (x, 4 if index == 17 else 0),
            "no pair": lambda: x,
            "single": lambda: (x,),
            "two labels": lambda: {"x": x, "label": 0, "target": 1},
            "text": lambda: ({"x": x, "name": "a.jpg"}, 0),
            "object": lambda: (object(), 0),
            "exit": lambda: (x, 0) if index != 17 else os._exit(9),
        }
        return cases.get(self.fault, lambda: (x, 0))()


def broken(data: DataSection) -> Any:
    """A Dataset whose fault is `data.label`."""
    return Broken(NUM_TRAIN, str(data.label)), Broken(NUM_TEST, "")


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(3), 0


def returned(data: DataSection) -> Any:
    """What `data.label` names."""
    values = {
        "iterable": Endless(),
        "generator": (x for x in range(3)),
        "mapping": {"train": Trees(8), "test": Trees(8)},
        "four": (Trees(8),) * 4,
        "half": (Trees(8), None),
        "empty": (Trees(0), Trees(8)),
        "list": [Trees(8), Trees(8)],
        "pairs": [(torch.zeros(3), k % 4) for k in range(40)],
        "unknown classes": (Tokens(), Tokens()),
    }
    return values[str(data.label)]


# --- arrays whose fetch augments ---------------------------------------------------------------


class Shifted(ArrayDataset):
    """Adds a number that depends on the epoch, and a random one."""

    def fetch(self, ids: Any, *, epochs: Any = None, generators: Any = None) -> Any:
        noise = np.array([generator.random() for generator in generators], dtype=np.float32)
        return super().fetch(ids) + 10 * epochs[:, None].astype(np.float32) + noise[:, None]


class Unseeded(ArrayDataset):
    def fetch(self, ids: Any) -> Any:
        return super().fetch(ids) + np.float32(random.random())  # noqa: S311


def arrays(data: DataSection) -> Datasets:
    kind = Shifted if data.label == "keyed" else Unseeded
    values, labels = np.zeros((NUM_TRAIN, 2), np.float32), np.arange(NUM_TRAIN) % 2
    train = kind(values, labels)
    return Datasets(train, ArrayDataset(values, labels), 2, (0.0, 0.0), (1.0, 1.0))
