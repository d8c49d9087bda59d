"""RandAugment and TrivialAugment: random operations on 8-bit images, by Pillow, as torchvision's on PIL images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from hvd_batchgrow.data.pipeline.crops import Draws

NUM_BINS = 31
"""Magnitudes of each operation, from the weakest, 0, to the strongest, 30."""
_FILL = 0
"""Value of pixels that a geometric operation brings in from beyond the image."""


@dataclass(frozen=True)
class Operation:
    """An operation on images, and the magnitudes that it may have."""

    name: str
    """As in torchvision."""
    magnitudes: NDArray[np.float64]
    """(NUM_BINS,)."""
    is_signed: bool
    """Whether the magnitude is negated with probability 1/2."""
    apply: Callable[[Image.Image, float], Image.Image]
    """Returns the changed image; the magnitude is the second argument."""


@dataclass(frozen=True)
class DrawnOperations:
    """The operations of n images."""

    indices: NDArray[np.int64]
    """(n, num_ops) index of each operation in the rule's list, in the order in which they are applied."""
    magnitudes: NDArray[np.float64]
    """(n, num_ops), with the sign."""

    def __getitem__(self, part: slice) -> DrawnOperations:
        return DrawnOperations(self.indices[part], self.magnitudes[part])


@dataclass(frozen=True)
class AutoAugment:
    """A rule that draws operations, each with the same probability, and applies them.

    Sources: RandAugment, Cubuk et al. 2020 (arXiv 1909.13719), §3; TrivialAugment, Müller & Hutter 2021 (arXiv
    2103.10158), §3 and table 8. Operations and magnitudes are torchvision's.
    """

    operations: tuple[Operation, ...]
    num_ops: int
    """Operations per image."""
    magnitude: int | None
    """Bin of every magnitude, 0 … NUM_BINS - 1; None: drawn for each operation."""

    @property
    def num_draws(self) -> int:
        """Number of uniform draws per sample."""
        return 3 * self.num_ops

    def sample(self, draws: Draws) -> DrawnOperations:
        """Return the operations of n images.

        Args:
            draws: (n, num_draws) uniforms in [0, 1).
        """
        which, strength, sign = draws.reshape(len(draws), self.num_ops, 3).transpose(2, 0, 1)
        indices = np.floor(which * len(self.operations)).astype(np.int64)
        bins = np.floor(strength * NUM_BINS).astype(np.int64) if self.magnitude is None else self.magnitude
        magnitudes = np.stack([operation.magnitudes for operation in self.operations])[indices, bins]
        is_signed = np.array([operation.is_signed for operation in self.operations])[indices]
        return DrawnOperations(indices, np.where(is_signed & (sign < 0.5), -magnitudes, magnitudes))

    def apply(self, image: Image.Image, drawn: DrawnOperations, k: int) -> Image.Image:
        """Return image k of those for which operations were drawn, changed. Its mode is L or RGB."""
        for index, magnitude in zip(drawn.indices[k].tolist(), drawn.magnitudes[k].tolist(), strict=True):
            image = self.operations[index].apply(image, magnitude)
        return image


def auto_augment(
    name: Literal["randaugment", "trivialaugment_wide"], size: tuple[int, int], num_ops: int, magnitude: int
) -> AutoAugment:
    """Return the rule with a name.

    Args:
        name: of the rule.
        size: height and width of the images, of which RandAugment's translations are fractions.
        num_ops: operations per image, for RandAugment; TrivialAugment applies one.
        magnitude: bin of the magnitudes, for RandAugment; TrivialAugment draws it.
    """
    if name == "trivialaugment_wide":
        return AutoAugment(_operations(0.99, (32.0, 32.0), 135.0, 0.99, 6), 1, None)
    shifts = (150 / 331 * size[0], 150 / 331 * size[1])
    return AutoAugment(_operations(0.3, shifts, 30.0, 0.9, 4), num_ops, magnitude)


def _operations(
    shear: float, shifts: tuple[float, float], degrees: float, factor: float, bits: int
) -> tuple[Operation, ...]:
    """Return the 14 operations of both rules, with these largest magnitudes.

    Args:
        shear: pixels per pixel.
        shifts: pixels, in height and in width.
        degrees: of a rotation.
        factor: change of the factor 1 of brightness, color, contrast and sharpness.
        bits: that posterizing removes.
    """
    nothing = np.zeros(NUM_BINS)

    def up_to(largest: float) -> NDArray[np.float64]:
        return largest * np.arange(NUM_BINS) / (NUM_BINS - 1)

    return (
        Operation("Identity", nothing, is_signed=False, apply=lambda image, _: image),
        Operation("ShearX", up_to(shear), is_signed=True, apply=lambda image, m: _affine(image, (1, m, 0, 0, 1, 0))),
        Operation("ShearY", up_to(shear), is_signed=True, apply=lambda image, m: _affine(image, (1, 0, 0, m, 1, 0))),
        Operation(
            "TranslateX",
            up_to(shifts[1]),
            is_signed=True,
            apply=lambda image, m: _affine(image, (1, 0, -int(m), 0, 1, 0)),
        ),
        Operation(
            "TranslateY",
            up_to(shifts[0]),
            is_signed=True,
            apply=lambda image, m: _affine(image, (1, 0, 0, 0, 1, -int(m))),
        ),
        Operation("Rotate", up_to(degrees), is_signed=True, apply=_rotate),
        Operation("Brightness", up_to(factor), is_signed=True, apply=_enhance(ImageEnhance.Brightness)),
        Operation("Color", up_to(factor), is_signed=True, apply=_enhance(ImageEnhance.Color)),
        Operation("Contrast", up_to(factor), is_signed=True, apply=_enhance(ImageEnhance.Contrast)),
        Operation("Sharpness", up_to(factor), is_signed=True, apply=_enhance(ImageEnhance.Sharpness)),
        Operation(
            "Posterize",
            8 - np.rint(up_to(bits)),
            is_signed=False,
            apply=lambda image, m: ImageOps.posterize(image, int(m)),
        ),
        Operation("Solarize", up_to(255)[::-1], is_signed=False, apply=_solarize),
        Operation("AutoContrast", nothing, is_signed=False, apply=lambda image, _: ImageOps.autocontrast(image)),
        Operation("Equalize", nothing, is_signed=False, apply=lambda image, _: ImageOps.equalize(image)),
    )


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Return the image whose pixel (x, y) is the nearest to (a x + b y + c, d x + e y + f) in the given one."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.NEAREST, fillcolor=_FILL
    )


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.NEAREST, fillcolor=_FILL)


def _solarize(image: Image.Image, threshold: float) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(threshold))  # whole values below it are below the next integer too


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, change: enhancer(image).enhance(1 + change)
