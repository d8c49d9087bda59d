"""Draw many photos of four fabrics, and a few of three others: many/ and few/, each with train/CLASS/ and val/CLASS/.

Patterns differ in scale, rotation, place and their two colors, and photos in size and brightness.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
Pattern = Callable[[Floats, Floats], NDArray[np.bool_]]

MANY: dict[str, Pattern] = {
    "checked": lambda x, y: np.sin(x) * np.sin(y) > 0,
    "dotted": lambda x, y: np.cos(x) + np.cos(y) > 1,
    "striped": lambda x, y: np.sin(x) > 0,
    "waved": lambda x, y: np.sin(x + 2 * np.sin(y)) > 0,
}
FEW: dict[str, Pattern] = {
    "bricked": lambda x, y: (np.cos(2 * y) > 0.7) | (np.cos(x + np.pi * (np.sin(y) > 0)) > 0.85),
    "dashed": lambda x, y: (np.cos(x) > 0.2) & (np.cos(y) > -0.5),
    "latticed": lambda x, y: (np.cos(x) > 0.6) | (np.cos(y) > 0.6),
}
"""Where a pattern has its second color, by place; 2π is one period."""


def draw(pattern: Pattern, generator: np.random.Generator) -> Image.Image:
    """Return one photo of a fabric."""
    width, height = generator.integers(48, 81, 2)
    angle, period = generator.uniform(0, np.pi), generator.uniform(10, 16)
    left, top = generator.uniform(0, [width, height])
    x, y = np.meshgrid(np.arange(width) - left, np.arange(height) - top)
    turned = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    second = pattern(2 * np.pi * turned[0] / period, 2 * np.pi * turned[1] / period)[:, :, None]
    dark, light = generator.uniform(0, 110, 3), generator.uniform(145, 255, 3)
    one, other = (dark, light) if generator.random() < 0.5 else (light, dark)
    pixels = np.where(second, one, other) * generator.uniform(0.6, 1) + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write(root: str, patterns: dict[str, Pattern], *, train: int, val: int, generator: np.random.Generator) -> None:
    """Write this many photos of each pattern."""
    for part, count in (("train", train), ("val", val)):
        for name, pattern in patterns.items():
            folder = Path(root, part, name)
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                draw(pattern, generator).save(folder / f"{k:03d}.jpg", quality=90)


def main() -> None:
    """Write the same photos each time."""
    generator = np.random.default_rng(0)
    write("data/many", MANY, train=160, val=40, generator=generator)
    write("data/few", FEW, train=16, val=60, generator=generator)
    draw(FEW["bricked"], generator).save("photo.jpg", quality=90)


if __name__ == "__main__":
    main()
