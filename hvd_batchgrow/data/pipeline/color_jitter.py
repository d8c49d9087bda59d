"""Color jitter: random brightness, contrast, saturation and hue of 8-bit images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.pipeline import image_operations as on
from hvd_batchgrow.data.pipeline.crops import Draws
from hvd_batchgrow.data.pipeline.image_operations import Image8

_CHANGES = (on.brightness, on.contrast, on.saturation, on.hue)


@dataclass(frozen=True)
class DrawnColors:
    """The changes of n images: of brightness, contrast, saturation and hue."""

    values: NDArray[np.float64]
    """(n, 4) factors of brightness, contrast and saturation; the change of hue, in turns of the color circle."""
    order: NDArray[np.int64]
    """(n, 4) the four, in the order in which they are applied."""

    def __getitem__(self, part: slice) -> DrawnColors:
        return DrawnColors(self.values[part], self.order[part])


@dataclass(frozen=True)
class ColorJitter:
    """A rule that draws color changes, and their order, and applies them.

    Factors are uniform in [max(0, 1 - x), 1 + x], and the change of hue is uniform in [-x, x].

    Source: torchvision's ColorJitter.
    """

    strengths: tuple[float, float, float, float]
    """x of brightness, contrast, saturation and hue; 0: not changed."""
    num_draws = 8

    def sample(self, draws: Draws) -> DrawnColors:
        """Return the changes of n images.

        Args:
            draws: (n, num_draws) uniforms in [0, 1).
        """
        *factors, hue = self.strengths
        low = np.array([*(max(0, 1 - x) for x in factors), -hue])
        high = np.array([*(1 + x for x in factors), hue])
        return DrawnColors(low + (high - low) * draws[:, :4], np.argsort(draws[:, 4:], axis=1, kind="stable"))

    def apply(self, pixels: Image8, drawn: DrawnColors, k: int) -> Image8:
        """Return image k, (H, W, C), with its drawn changes applied."""
        for which in drawn.order[k].tolist():
            if self.strengths[which]:
                pixels = _CHANGES[which](pixels, float(drawn.values[k, which]))
        return pixels
