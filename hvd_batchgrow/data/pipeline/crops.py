"""Augmentation as numbers: the crop of an image is a function of its draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]
Pixels = NDArray[np.int32]
_MARGIN = 8
"""Margin around the visible part that is resized too, as a multiple of the image's shorter side."""


@dataclass(frozen=True)
class CropParams:
    """Parameters for n images: a window is cut out, resized, cropped and mirrored."""

    windows: Pixels
    """(n, 4) top, left, height, width in pixels of the image; zeros beyond its edges."""
    resized: Pixels
    """(n, 2) height and width to which the window is resized; equal to its own: not resized."""
    corners: Pixels
    """(n, 2) row and column of the crop in the resized window."""
    mirrors: Pixels
    """(n,) 1: mirrored left to right."""
    out_size: tuple[int, int]
    """Height and width of the results."""

    def __getitem__(self, part: slice) -> CropParams:
        return CropParams(self.windows[part], self.resized[part], self.corners[part], self.mirrors[part], self.out_size)


class Augment(Protocol):
    """A rule that turns draws into crops."""

    @property
    def num_draws(self) -> int:
        """Number of uniform draws per sample."""

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""

    def sample_crops(self, draws: Draws, sizes: Pixels) -> CropParams:
        """Return the crops of n images.

        Args:
            draws: (n, num_draws) uniforms in [0, 1).
            sizes: (n, 2) height and width of each image.
        """


@dataclass(frozen=True)
class CropFlip:
    """For images of one size: zero padding, a random crop of the original size, a random mirror."""

    out_size: tuple[int, int]
    crop_padding: int
    hflip: bool
    num_draws = 3

    def sample_crops(self, draws: Draws, sizes: Pixels) -> CropParams:
        """See `Augment`. Corners are uniform over the (2 · padding + 1)² positions."""
        n, positions = len(draws), 2 * self.crop_padding + 1
        windows = np.empty((n, 4), dtype=np.int32)
        windows[:, :2] = np.floor(draws[:, :2] * positions) - self.crop_padding
        windows[:, 2:] = self.out_size
        mirrors = _mirrors(draws[:, 2], hflip=self.hflip)
        return CropParams(windows, windows[:, 2:], np.zeros((n, 2), np.int32), mirrors, self.out_size)


@dataclass(frozen=True)
class ResizedCrop:
    """For images of any size: a window of random area and aspect, resized to a square; a random mirror.

    The window's fraction of the image's area is uniform in `area`, and log(width/height) is uniform between the
    logarithms of `aspect`. The first of ten such windows that fits is placed uniformly. If no window fits, the largest
    central one of an allowed aspect is used.

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
        """Return (n, 10, 2) height and width of each attempt."""
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
        return np.stack(shape, axis=1).clip(min=1)  # images one pixel wide have no window of some aspects


@dataclass(frozen=True)
class CenterCrop:
    """For testing: resize the shorter side and crop the center, as torchvision's Resize and CenterCrop."""

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
        """Return (n, 2) rows and columns cut off each end before the resize; 0 for images of ordinary aspect.

        A 1 × 60,000 image would become 256 × 15,360,000 pixels, of which only the center is used. Pixels are cut off
        only beyond the reach of the resizing filter, and in multiples of the shorter side, which keeps the crop in
        place.
        """
        needed = np.array(self.out_size) * short.astype(np.int64) // self.eval_resize + _MARGIN * short
        spare = np.where(sizes == short, 0, np.maximum(sizes - needed, 0))
        return spare // (2 * short) * short


def _mirrors(draws: Draws, *, hflip: bool) -> Pixels:
    return ((draws < 0.5) & hflip).astype(np.int32)
