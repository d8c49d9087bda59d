"""RandAugment and TrivialAugment: random operations on 8-bit images, with torchvision's names and magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.pipeline import image_operations as on
from hvd_batchgrow.data.pipeline.crops import Draws
from hvd_batchgrow.data.pipeline.image_operations import Image8

NUM_BINS = 31
"""Magnitudes of each operation, from the weakest, 0, to the strongest, 30."""


@dataclass(frozen=True)
class Operation:
    """An operation on images, and the magnitudes that it may have."""

    name: str
    """As in torchvision."""
    magnitudes: NDArray[np.float64]
    """(NUM_BINS,)."""
    is_signed: bool
    """Whether the magnitude is negated with probability 1/2."""
    apply: Callable[[Image8, float], Image8]
    """Returns the changed image (H, W, C); the magnitude is the second argument."""


@dataclass(frozen=True)
class DrawnOperations:
    """The operations of n images."""

    indices: NDArray[np.int64]
    """(n, num_ops) index of each operation in `AutoAugment.operations`, in the order of application."""
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

    def apply(self, pixels: Image8, drawn: DrawnOperations, k: int) -> Image8:
        """Return image k, (H, W, C), with its drawn operations applied."""
        for index, magnitude in zip(drawn.indices[k].tolist(), drawn.magnitudes[k].tolist(), strict=True):
            pixels = self.operations[index].apply(pixels, magnitude)
        return pixels


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
        Operation("Identity", nothing, is_signed=False, apply=lambda pixels, _: pixels),
        Operation("ShearX", up_to(shear), is_signed=True, apply=on.shear_x),
        Operation("ShearY", up_to(shear), is_signed=True, apply=on.shear_y),
        Operation("TranslateX", up_to(shifts[1]), is_signed=True, apply=on.translate_x),
        Operation("TranslateY", up_to(shifts[0]), is_signed=True, apply=on.translate_y),
        Operation("Rotate", up_to(degrees), is_signed=True, apply=on.rotate),
        Operation("Brightness", up_to(factor), is_signed=True, apply=_from_1(on.brightness)),
        Operation("Color", up_to(factor), is_signed=True, apply=_from_1(on.saturation)),
        Operation("Contrast", up_to(factor), is_signed=True, apply=_from_1(on.contrast)),
        Operation("Sharpness", up_to(factor), is_signed=True, apply=_from_1(on.sharpness)),
        Operation("Posterize", 8 - np.rint(up_to(bits)), is_signed=False, apply=on.posterize),
        Operation("Solarize", up_to(255)[::-1], is_signed=False, apply=on.solarize),
        Operation("AutoContrast", nothing, is_signed=False, apply=lambda pixels, _: on.autocontrast(pixels)),
        Operation("Equalize", nothing, is_signed=False, apply=lambda pixels, _: on.equalize(pixels)),
    )


def _from_1(change: Callable[[Image8, float], Image8]) -> Callable[[Image8, float], Image8]:
    """Return the operation whose magnitude is added to the factor 1, which changes nothing."""
    return lambda pixels, magnitude: change(pixels, 1 + magnitude)
