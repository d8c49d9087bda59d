"""Augmentation of training images after the crop: which operations each sample gets, and their application."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.data.order.stream import sample_draws
from hvd_batchgrow.data.pipeline.auto_augment import AutoAugment, DrawnOperations, auto_augment
from hvd_batchgrow.data.pipeline.color_jitter import ColorJitter, DrawnColors
from hvd_batchgrow.data.pipeline.crops import Pixels
from hvd_batchgrow.data.pipeline.erasing import RandomErasing
from hvd_batchgrow.data.pipeline.image_operations import Image8

_AUTO_AUGMENT, _COLOR_JITTER, _ERASING = 1, 2, 3
"""`use` of `sample_draws` for each rule."""


@dataclass(frozen=True)
class PixelAugment:
    """The pixel rules of a job, in the order of application; None: no such rule. Erasing follows normalization.

    Every parameter is a pure function of seed, epoch and sample id.
    """

    auto_augment: AutoAugment | None
    color_jitter: ColorJitter | None
    erasing: RandomErasing | None

    def sample(self, seed: int, epochs: Ids, ids: Ids) -> PixelParams:
        """Return the parameters of some samples.

        Args:
            seed: of the run.
            epochs: (n,) epoch of each sample.
            ids: (n,) sample ids.
        """
        ops, colors, erasing = self.auto_augment, self.color_jitter, self.erasing
        return PixelParams(
            self,
            ops.sample(sample_draws(seed, epochs, ids, ops.num_draws, _AUTO_AUGMENT)) if ops else None,
            colors.sample(sample_draws(seed, epochs, ids, colors.num_draws, _COLOR_JITTER)) if colors else None,
            erasing.sample(sample_draws(seed, epochs, ids, erasing.num_draws, _ERASING)) if erasing else None,
        )


@dataclass(frozen=True)
class PixelParams:
    """Parameters of the pixels of n images, by rule."""

    rule: PixelAugment
    operations: DrawnOperations | None
    colors: DrawnColors | None
    rectangles: Pixels | None
    """(n, 4) for `erase`."""

    def __getitem__(self, part: slice) -> PixelParams:
        operations, colors, rectangles = (
            drawn if drawn is None else drawn[part] for drawn in (self.operations, self.colors, self.rectangles)
        )
        return PixelParams(self.rule, operations, colors, rectangles)  # type: ignore[arg-type]

    def alter(self, pixels: Image8, k: int) -> Image8:
        """Return image k with its operations and color changes applied.

        Args:
            pixels: (H, W, 1) or (H, W, 3), in any memory layout.
            k: index of the image among the n.
        """
        if self.operations is not None and self.rule.auto_augment:
            pixels = self.rule.auto_augment.apply(pixels, self.operations, k)
        if self.colors is not None and self.rule.color_jitter:
            pixels = self.rule.color_jitter.apply(pixels, self.colors, k)
        return pixels


def pixel_augment(data: DataSection, size: tuple[int, int]) -> PixelAugment | None:
    """Return the pixel rules of a job; None: it has no rule.

    Args:
        data: the job's section.
        size: height and width of the images after the crop.
    """
    operations, colors, erasing = None, None, None
    if data.auto_augment:
        operations = auto_augment(data.auto_augment, size, data.randaugment_num_ops, data.randaugment_magnitude)
    if data.color_jitter:
        colors = ColorJitter(data.color_jitter)
    if data.random_erasing:
        erasing = RandomErasing(size, data.random_erasing, data.random_erasing_scale, data.random_erasing_ratio)
    return PixelAugment(operations, colors, erasing) if operations or colors or erasing else None
