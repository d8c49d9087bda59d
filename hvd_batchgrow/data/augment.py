"""Augmentation as numbers: what is done to a sample follows from its draws alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CropFlip:
    """Pad by zeros, crop the image's own size at random, mirror at random."""

    pad_pixels: int
    flip: bool

    num_draws = 3

    def place(self, draws: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Turn draws into crop corners and mirrors.

        Args:
            draws: (n, 3) uniforms in [0, 1).

        Returns:
            corners int32 (n, 2): row and column of the crop in the unpadded image, -pad … pad;
            mirrors int32 (n,): 1 to mirror left to right.
        """
        positions = 2 * self.pad_pixels + 1
        corners = np.floor(draws[:, :2] * positions).astype(np.int32, order="C") - self.pad_pixels
        mirrors = (draws[:, 2] < 0.5) & self.flip
        return corners, mirrors.astype(np.int32)
