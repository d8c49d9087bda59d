"""Images of characters, drawn by PIL: the same bytes for the same face, character and copy."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_OVERSAMPLING = 4
"""Characters are drawn this many times larger, rotated, and then averaged."""
_FILLED = 0.82
"""Size of a face's characters, the larger of height and width, as a fraction of the image's side."""


@dataclass(frozen=True)
class Placement:
    """How a copy differs from the upright, centered image of a character."""

    rotation_degrees: float = 0.0
    """Clockwise."""
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    """To the right and down, as fractions of the image's side."""


def placement_of(name: str, character: str, copy: int) -> Placement:
    """Return the placement of a copy, which depends only on the arguments.

    The rotation is uniform in ±15 degrees, the scale in 0.8 … 1, and each shift in ±8 % of the side.

    Args:
        name: name of the face.
        character: one character.
        copy: number of the copy.
    """
    a, b, c, d = _generator("placement", name, character, copy).random(4).tolist()
    return Placement(15 * (2 * a - 1), 0.8 + 0.2 * b, (0.08 * (2 * c - 1), 0.08 * (2 * d - 1)))


def degraded(image: NDArray[np.uint8], name: str, character: str, copy: int) -> NDArray[np.uint8]:
    """Return an image with less contrast and with noise, which depend only on the arguments.

    A pixel p becomes g + c p + n, rounded and clipped to 0 … 255. For each image, the contrast c is uniform in
    0.35 … 1, the background g in 0 … 255 (1 - c), and s in 0 … 100. For each pixel, the noise n is triangular in ±s.

    Args:
        image: (side, side).
        name: name of the face.
        character: one character.
        copy: number of the copy.
    """
    generator = _generator("degraded", name, character, copy)
    a, b, c = generator.random(3).tolist()
    contrast = 0.35 + 0.65 * a
    first, second = generator.random((2, *image.shape))
    pixels = 255 * (1 - contrast) * b + contrast * image + 100 * c * (first - second)
    return np.asarray(np.clip(np.rint(pixels), 0, 255), np.uint8)


def _generator(*key: str | int) -> np.random.Generator:
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))


def open_font(path: Path, index: int, size: float) -> ImageFont.FreeTypeFont:
    """Open a face with PIL's basic layout, which uses no other library. Raises OSError if it cannot be read."""
    return ImageFont.truetype(path, size, index, layout_engine=ImageFont.Layout.BASIC)


class GlyphPainter:
    """Draws the characters of a face at one size on a common baseline, so that o and O differ.

    Args:
        path: font file.
        index: position of the face in a collection.
        characters: the size is chosen so that each of them fits into the image.
        side: side of the images in pixels.

    Raises:
        OSError: the file cannot be read.
        ValueError: the characters have no extent.
    """

    def __init__(self, path: Path, index: int, characters: str, side: int) -> None:
        self._side = side
        reference = open_font(path, index, 100)
        boxes = [reference.getbbox(character, anchor="ls") for character in characters]
        height = max(box[3] for box in boxes) - min(box[1] for box in boxes)
        extent = max(height, *(box[2] - box[0] for box in boxes))
        if extent <= 0:
            raise ValueError("the characters have no extent")
        self._font = open_font(path, index, 100 * _FILLED * side * _OVERSAMPLING / extent)
        boxes = [self._font.getbbox(character, anchor="ls") for character in characters]
        self._middle = (max(box[3] for box in boxes) + min(box[1] for box in boxes)) / 2

    def draw(self, character: str, placement: Placement | None = None) -> NDArray[np.uint8]:
        """Return an image (side, side): the character is white, the background black."""
        placement = placement or Placement()
        large = self._side * _OVERSAMPLING
        left, _, right, _ = self._font.getbbox(character, anchor="ls")
        canvas = Image.new("L", (large, large))
        origin = round((large - left - right) / 2), round(large / 2 - self._middle)
        ImageDraw.Draw(canvas).text(origin, character, fill=255, font=self._font, anchor="ls")
        canvas = canvas.transform(
            (large, large), Image.Transform.AFFINE, _affine(placement, large), Image.Resampling.BILINEAR
        )
        return np.asarray(canvas.reduce(_OVERSAMPLING))


def _affine(placement: Placement, side: int) -> tuple[float, float, float, float, float, float]:
    """Return (a, b, c, d, e, f): point (x, y) of the result is point (a x + b y + c, d x + e y + f) of the drawing."""
    angle = math.radians(placement.rotation_degrees)
    a, b = math.cos(angle) / placement.scale, math.sin(angle) / placement.scale
    x, y = side / 2 + placement.shift[0] * side, side / 2 + placement.shift[1] * side
    return a, b, side / 2 - a * x - b * y, -b, a, side / 2 + b * x - a * y
