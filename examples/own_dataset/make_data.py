"""Draw light discs, squares and crosses on a dark background: data/train.npz, data/val.npz and data/test.npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIZES = {"train": 900, "val": 150, "test": 150}
SIDE = 32


def draw(label: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return one image, (3, 32, 32): a disc (0), a square (1) or a cross (2)."""
    row, column = generator.integers(8, SIDE - 8, 2)
    radius = generator.integers(5, 9)
    y, x = np.mgrid[:SIDE, :SIDE] - np.array([row, column])[:, None, None]
    square = (np.abs(y) <= radius) & (np.abs(x) <= radius)
    cross = square & ((np.abs(y) <= 2) | (np.abs(x) <= 2))
    inside = (y**2 + x**2 <= radius**2, square, cross)[label]
    dark, light = generator.integers(0, 100, 3), generator.integers(156, 256, 3)
    return np.where(inside, light[:, None, None], dark[:, None, None]).astype(np.uint8)


def main() -> None:
    """Write the same images each time."""
    generator = np.random.default_rng(0)
    Path("data").mkdir(exist_ok=True)
    for part, size in SIZES.items():
        labels = generator.integers(0, 3, size)
        np.savez(Path("data", f"{part}.npz"), images=[draw(label, generator) for label in labels], labels=labels)


if __name__ == "__main__":
    main()
