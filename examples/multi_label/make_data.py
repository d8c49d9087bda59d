"""Draw signs that each show any of four symbols: data/…_images.npy, data/…_targets.npy and another one, sign.png.

A sign is 32 × 32 pixels. Each symbol is present with probability 0.4, at any place and in any color, and symbols may
cover each other in part. The targets are 0 or 1 for each symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SYMBOLS = ("circle", "cross", "square", "triangle")
"""In the order of the targets."""
SIDE = 32
COUNTS = {"train": 2000, "test": 500}


def draw(present: Sequence[bool], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return a sign with the symbols that are present."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(generator.integers(0, 90, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for k in generator.permutation(len(SYMBOLS)):
        if not present[k]:
            continue
        size = int(generator.integers(9, 13))
        left, top = generator.integers(1, SIDE - size - 1, 2).tolist()
        right, bottom, color = left + size, top + size, tuple(generator.integers(130, 256, 3).tolist())
        if SYMBOLS[k] == "circle":
            pen.ellipse([left, top, right, bottom], fill=color)
        elif SYMBOLS[k] == "square":
            pen.rectangle([left, top, right, bottom], fill=color)
        elif SYMBOLS[k] == "triangle":
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=color)
        else:
            pen.line([left, top, right, bottom], fill=color, width=3)
            pen.line([left, bottom, right, top], fill=color, width=3)
    pixels = np.asarray(image) + generator.normal(0, 8, (SIDE, SIDE, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def main() -> None:
    """Write the same signs each time."""
    generator = np.random.default_rng(0)
    Path("data").mkdir(exist_ok=True)
    for part, count in COUNTS.items():
        targets = generator.random((count, len(SYMBOLS))) < 0.4
        np.save(f"data/{part}_images.npy", np.stack([draw(present, generator) for present in targets]))
        np.save(f"data/{part}_targets.npy", targets.astype(np.float32))
    Image.fromarray(draw([True, False, False, True], generator)).save("sign.png")


if __name__ == "__main__":
    main()
