"""Draw photos of four fabrics: data/train/CLASS/….jpg and data/val/CLASS/….jpg, and photo.jpg, which is in neither.

Patterns differ in scale, rotation, place and their two colors, and photos in size and brightness.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]

PER_CLASS = {"train": 160, "val": 40}
FABRICS: dict[str, Callable[[Floats, Floats], NDArray[np.bool_]]] = {
    "checked": lambda x, y: np.sin(x) * np.sin(y) > 0,
    "dotted": lambda x, y: np.cos(x) + np.cos(y) > 1,
    "striped": lambda x, y: np.sin(x) > 0,
    "waved": lambda x, y: np.sin(x + 2 * np.sin(y)) > 0,
}
"""Where a pattern has its second color, by place; 2π is one period."""


def draw(fabric: str, generator: np.random.Generator) -> Image.Image:
    """Return one photo of a fabric."""
    width, height = generator.integers(48, 81, 2)
    angle, period = generator.uniform(0, np.pi), generator.uniform(10, 16)
    left, top = generator.uniform(0, [width, height])
    x, y = np.meshgrid(np.arange(width) - left, np.arange(height) - top)
    turned = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    second = FABRICS[fabric](2 * np.pi * turned[0] / period, 2 * np.pi * turned[1] / period)[:, :, None]
    dark, light = generator.uniform(0, 110, 3), generator.uniform(145, 255, 3)
    one, other = (dark, light) if generator.random() < 0.5 else (light, dark)
    pixels = np.where(second, one, other) * generator.uniform(0.6, 1) + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def main() -> None:
    """Write the same photos each time."""
    generator = np.random.default_rng(0)
    for part, count in PER_CLASS.items():
        for fabric in FABRICS:
            folder = Path("data", part, fabric)
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                draw(fabric, generator).save(folder / f"{k:03d}.jpg", quality=90)
    draw("dotted", generator).save("photo.jpg", quality=90)


if __name__ == "__main__":
    main()
