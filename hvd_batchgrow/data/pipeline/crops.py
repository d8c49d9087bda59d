"""Augmentation as numbers: where a sample is cut out of its image follows from its draws alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]
Pixels = NDArray[np.int32]
_MARGIN = 8
"""Multiple of an image's shorter side that is resized beside the part that the crop shows."""


@dataclass(frozen=True)
class CropParams:
    """What becomes of n images: a window is cut out, resized, cut again, and mirrored."""

    windows: Pixels
    """(n, 4) top, left, height, width in pixels of the image; beyond its edges are zeros."""
    resized: Pixels
    """(n, 2) height and width that the window is brought to; its own: it stays as it is."""
    corners: Pixels
    """(n, 2) row and column, in the resized window, of what is kept."""
    mirrors: Pixels
    """(n,) 1: left and right change places."""
    out_size: tuple[int, int]
    """Height and width of the results."""

    def __getitem__(self, part: slice) -> CropParams:
        return CropParams(self.windows[part], self.resized[part], self.corners[part], self.mirrors[part], self.out_size)


class Augment(Protocol):
    """A rule that turns draws into placements."""

    @property
    def num_draws(self) -> int:
        """Uniforms needed for each sample."""

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""

    def sample_crops(self, draws: Draws, sizes: Pixels) -> CropParams:
        """Place n images.

        Args:
            draws: (n, num_draws) uniforms in [0, 1).
            sizes: (n, 2) height and width of each image.
        """


@dataclass(frozen=True)
class CropFlip:
    """For images of one size: zeros around, a crop of the image's own size, a mirror at random."""

    out_size: tuple[int, int]
    crop_padding: int
    hflip: bool
    num_draws = 3

    def sample_crops(self, draws: Draws, sizes: Pixels) -> CropParams:
        """See `Augment`: corners are uniform over the (2 · pad + 1)² positions."""
        n, positions = len(draws), 2 * self.crop_padding + 1
        windows = np.empty((n, 4), dtype=np.int32)
        windows[:, :2] = np.floor(draws[:, :2] * positions) - self.crop_padding
        windows[:, 2:] = self.out_size
        mirrors = _mirrors(draws[:, 2], hflip=self.hflip)
        return CropParams(windows, windows[:, 2:], np.zeros((n, 2), np.int32), mirrors, self.out_size)


@dataclass(frozen=True)
class ResizedCrop:
    """For images of any size: a window of random area and aspect, resized to a square; a mirror at random.

    The window's share of the image's area is uniform in `area`, the logarithm of width/height uniform
    in that of `aspect`. Of ten such windows the first that fits is placed uniformly; if none fits, it is
    the largest central one whose aspect is allowed.

    Source: torchvision's RandomResizedCrop, after Szegedy et al. 2014 (arXiv 1409.4842), §6.
    """

    out_size: tuple[int, int]
    area: tuple[float, float]
    aspect: tuple[float, float]
    hflip: bool
    num_draws = 2 * 10 + 3

    def sample_crops(self, draws: Draws, sizes: Pixels) -> CropParams:
        """See `Augment`."""
        n = len(draws)
        shapes = self._shapes(draws[:, :20].reshape(n, 10, 2), sizes)
        fits = np.logical_and(shapes > 0, shapes <= sizes[:, None]).all(axis=2)
        any_fits = np.any(fits, axis=1, keepdims=True)
        shape = np.where(any_fits, shapes[np.arange(n), np.argmax(fits, axis=1)], self._fallback(sizes))
        room = sizes - shape
        corner = np.where(any_fits, np.floor(draws[:, 20:22] * (room + 1)), room // 2)
        windows = np.concatenate((corner, shape), axis=1).astype(np.int32)
        resized = np.full((n, 2), self.out_size, dtype=np.int32)
        mirrors = _mirrors(draws[:, 22], hflip=self.hflip)
        return CropParams(windows, resized, np.zeros((n, 2), np.int32), mirrors, self.out_size)

    def _shapes(self, draws: Draws, sizes: Pixels) -> NDArray[np.float64]:
        """(n, 10, 2) height and width of each attempt."""
        low, high = self.area
        area = sizes.prod(axis=1, dtype=np.float64)[:, None] * (low + (high - low) * draws[..., 0])
        low, high = map(math.log, self.aspect)
        aspect = np.exp(low + (high - low) * draws[..., 1])
        shapes: NDArray[np.float64] = np.rint(np.stack((np.sqrt(area / aspect), np.sqrt(area * aspect)), axis=2))
        return shapes

    def _fallback(self, sizes: Pixels) -> NDArray[np.float64]:
        height, width = sizes.T
        aspect = np.clip(width / np.maximum(height, 1), *self.aspect)
        shape = np.minimum(height, np.rint(width / aspect)), np.minimum(width, np.rint(height * aspect))
        return np.stack(shape, axis=1).clip(min=1)  # an image that is a pixel wide has no window of some aspects


@dataclass(frozen=True)
class CentreCrop:
    """For testing: the shorter side resized, the centre cut out. As torchvision's Resize and CenterCrop."""

    out_size: tuple[int, int]
    eval_resize: int
    num_draws = 0

    def sample_crops(self, draws: Draws, sizes: Pixels) -> CropParams:
        """See `Augment`; draws are not used."""
        short = np.maximum(sizes.min(axis=1, keepdims=True), 1)
        cut = self._unseen(sizes, short)
        shape = sizes - 2 * cut
        resized = np.where(sizes == short, self.eval_resize, self.eval_resize * shape // short).astype(np.int32)
        corners = np.rint((resized - self.out_size) / 2).astype(np.int32)
        windows = np.concatenate((cut, shape), axis=1).astype(np.int32)
        return CropParams(windows, resized, corners, np.zeros(len(sizes), np.int32), self.out_size)

    def _unseen(self, sizes: Pixels, short: Pixels) -> NDArray[np.int64]:
        """(n, 2) rows and columns that are cut off either end before the resize; 0 for images of ordinary aspect.

        Of a 1 × 60,000 image resized to 256 × 15,360,000 pixels only the centre is used. What is cut off lies
        further from the crop than the resizing filter reaches. It is a multiple of the shorter side, so that the crop
        stays where it is.
        """
        needed = np.array(self.out_size) * short.astype(np.int64) // self.eval_resize + _MARGIN * short
        spare = np.where(sizes == short, 0, np.maximum(sizes - needed, 0))
        return spare // (2 * short) * short


def _mirrors(draws: Draws, *, hflip: bool) -> Pixels:
    return ((draws < 0.5) & hflip).astype(np.int32)
