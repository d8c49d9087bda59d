"""Mixup and CutMix within each ghost batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.comm.to_device import to_device

_LAM_STEPS = 1 << 24
"""The share λ is a multiple of 1/_LAM_STEPS, so that λ and 1 - λ are exact in float32."""


@dataclass(frozen=True)
class Mix:
    """How a ghost batch is mixed."""

    lam: float
    """λ: weight of each sample's own target; 1 - λ is the weight of its partner's."""
    partners: NDArray[np.int64]
    """(γ,) index of each sample's partner in the ghost batch, which is never the sample itself."""
    box: tuple[int, int, int, int] | None
    """CutMix: top, left, bottom and right of the part that is the partner's. None: Mixup."""


@dataclass(frozen=True)
class Mixing:
    """The job's rule for Mixup and CutMix, with one λ for each ghost batch.

    Everything is a pure function of the seed and the index of the ghost batch in the stream.

    Sources: Zhang et al. 2018 (arXiv 1710.09412), eq. 1; Yun et al. 2019 (arXiv 1905.04899), eqs. 1 and 2. The keys
    are those of timm's Mixup with mode "batch" and correct_lam.
    """

    mixup_alpha: float
    """Both parameters of λ's Beta distribution for Mixup; 0: no Mixup."""
    cutmix_alpha: float
    """Likewise for CutMix; 0: no CutMix. At least one of the two is above 0."""
    prob: float
    """Probability that a ghost batch is mixed."""
    switch_prob: float
    """If both alphas are above 0: probability that a mixed ghost batch is mixed by CutMix."""
    seed: int
    ghost_batch: int
    """γ."""
    num_classes: int

    def sample(self, index: int, size: tuple[int, int]) -> Mix | None:
        """Return how a ghost batch is mixed; None: it is not.

        Args:
            index: of the ghost batch in the stream.
            size: height and width of the images.
        """
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=index << 64))
        is_mixed, switch, *center = generator.random(4)
        order = np.argsort(generator.random(self.ghost_batch), kind="stable")
        if is_mixed >= self.prob:
            return None
        is_cutmix = switch < self.switch_prob if self.mixup_alpha and self.cutmix_alpha else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if is_cutmix else self.mixup_alpha
        lam = round(generator.beta(alpha, alpha) * _LAM_STEPS) / _LAM_STEPS
        partners = np.empty_like(order)
        partners[order] = np.roll(order, 1)  # one cycle through all samples: each has another partner
        if not is_cutmix:
            return Mix(lam, partners, None)
        top, left, bottom, right = box = _box(lam, size, center)
        return Mix(1 - (bottom - top) * (right - left) / math.prod(size), partners, box)

    def mix(self, images: Tensor, classes: Tensor, indices: Sequence[int]) -> Tensor:
        """Mix the images of whole ghost batches in place, each ghost batch separately, and return the mixed targets.

        Args:
            images: (m γ, C, H, W) of m ghost batches, on any device; the host does not wait for it.
            classes: int64 (m γ,).
            indices: (m,) index of each ghost batch in the stream.

        Returns:
            float32 (m γ, num_classes), probabilities of the classes.
        """
        targets = (classes[:, None] == torch.arange(self.num_classes, device=classes.device)).float()
        for k, index in enumerate(indices):
            part = slice(k * self.ghost_batch, (k + 1) * self.ghost_batch)
            if mix := self.sample(index, (images.shape[2], images.shape[3])):
                partners = to_device(torch.from_numpy(mix.partners), images.device)
                _blend(targets[part], partners, mix.lam)
                if mix.box is None:
                    _blend(images[part], partners, mix.lam)
                else:
                    top, left, bottom, right = mix.box
                    boxes = images[part, :, top:bottom, left:right]
                    boxes.copy_(boxes[partners])
        return targets


def _box(lam: float, size: tuple[int, int], center: Sequence[float]) -> tuple[int, int, int, int]:
    """Return a box of 1 - λ of the area around a uniform center, cut at the image's edges."""
    share = math.sqrt(1 - lam)
    low, high = [], []
    for side, draw in zip(size, center, strict=True):
        middle, half = int(draw * side), int(0.5 * share * side)
        low.append(max(middle - half, 0))
        high.append(min(middle + half, side))
    return low[0], low[1], high[0], high[1]


def _blend(values: Tensor, partners: Tensor, lam: float) -> None:
    """Set each value to λ times itself plus 1 - λ times its partner, in place.

    Each product and sum is rounded separately, so the result is bit-identical on any device and in any layout.
    """
    others = values[partners].mul_(1 - lam)
    values.mul_(lam).add_(others)
