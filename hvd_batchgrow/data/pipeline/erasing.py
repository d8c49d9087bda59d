"""Random erasing: set a random rectangle of a normalized image to 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hvd_batchgrow.data.pipeline.crops import Draws, Pixels

_ATTEMPTS = 10


@dataclass(frozen=True)
class RandomErasing:
    """A rule that draws rectangles.

    A rectangle's fraction of the area is uniform in `scale`, and log(height/width) is uniform between the logarithms
    of `ratio`. The first of ten such rectangles that is smaller than the image in both directions is placed uniformly;
    if all are too large, nothing is erased.

    Source: Zhong et al. 2020 (arXiv 1708.04896), algorithm 1, as in torchvision's RandomErasing.
    """

    size: tuple[int, int]
    """Height and width of the images."""
    probability: float
    """Probability that a rectangle of an image is erased."""
    scale: tuple[float, float]
    ratio: tuple[float, float]
    num_draws = 1 + 2 * _ATTEMPTS + 2

    def sample(self, draws: Draws) -> Pixels:
        """Return the rectangles of n images.

        Args:
            draws: (n, num_draws) uniforms in [0, 1).

        Returns:
            (n, 4) top, left, height and width; zeros: nothing is erased.
        """
        n = len(draws)
        share, shape = draws[:, 1 : 1 + 2 * _ATTEMPTS].reshape(n, _ATTEMPTS, 2).transpose(2, 0, 1)
        low, high = self.scale
        area = math.prod(self.size) * (low + (high - low) * share)
        low, high = map(math.log, self.ratio)
        aspect = np.exp(low + (high - low) * shape)
        sides = np.rint(np.stack((np.sqrt(area * aspect), np.sqrt(area / aspect)), axis=2))
        fits = (sides < self.size).all(axis=2)
        side = sides[np.arange(n), np.argmax(fits, axis=1)]
        corner = np.floor(draws[:, -2:] * (np.array(self.size) - side + 1))
        is_erased = fits.any(axis=1) & (draws[:, 0] < self.probability)
        return np.where(is_erased[:, None], np.concatenate((corner, side), axis=1), 0).astype(np.int32)


def erase(images: Tensor, rectangles: Pixels) -> None:
    """Set a rectangle of each image to 0, in place.

    Args:
        images: (n, C, H, W), on any device; the host does not wait for it.
        rectangles: (n, 4) from `RandomErasing.sample`.
    """
    for k in np.flatnonzero(rectangles[:, 2] * rectangles[:, 3]).tolist():
        top, left, height, width = rectangles[k].tolist()
        images[k, :, top : top + height, left : left + width] = 0
