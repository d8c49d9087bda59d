"""The noise scale of SGD, and the learning rate or batch that gives a requested one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_batchgrow.schedule.rounding import decimal


@dataclass(frozen=True)
class NoiseScale:
    """Scale of the random fluctuations that mini-batch sampling adds to training.

    Leading order, for B ≪ N:           g = ε N / (B (1-m))
    exact, for any B < N:               g = ε/(1-m) · (N/B - 1)
    normalized gradients:               g = ε √(n(B) n(B₀)), where n(B) is N/B, or if exact N/B - 1:
                                        Adam divides a gradient by the size of its noise

    Growing the batch and decaying the learning rate both lower it. ε is the learning
    rate, m the momentum, B the global batch in samples, B₀ the first one, N the training-set size.

    The buffer of SGD adds up gradients, so that each moves the weights 1/(1-m) times. Adam averages them, with
    weights whose sum is 1. Its noise scale therefore has no factor 1/(1-m), in any of the forms.

    Args:
        num_samples: N.
        exact: use the exact form.
        normalized_from: B₀ for the form of normalized gradients; None for the other forms.
        averages_gradients: the optimizer averages gradients, as Adam does.

    Source: Smith & Le 2017 (arXiv 1710.06451); Smith et al. 2018 (arXiv 1711.00489), §2 and §4; for Adam Malladi et al.
    2022 (arXiv 2205.10287).
    """

    num_samples: int
    exact: bool = False
    normalized_from: int | None = None
    averages_gradients: bool = False

    def of(self, lr: float, momentum: float, global_batch: float) -> float:
        """Return the noise scale."""
        return lr / self._rest(momentum) * self._per_lr(global_batch)

    def lr_for(self, noise: float, momentum: float, global_batch: float) -> float:
        """Return the learning rate that gives a noise scale."""
        return noise * self._rest(momentum) / self._per_lr(global_batch)

    def batch_for(self, noise: float, momentum: float, lr: float) -> float:
        """Return the batch, in samples and not rounded, that gives a noise scale."""
        wanted = noise * self._rest(momentum) / lr
        if self.normalized_from:
            wanted = wanted**2 / self._plain(self.normalized_from)
        return self.num_samples / (1 + wanted if self.exact else wanted)

    def _per_lr(self, global_batch: float) -> float:
        """Return g (1-m)/ε."""
        if self.normalized_from is None:
            return self._plain(global_batch)
        if self.exact:
            return math.sqrt(self._plain(global_batch) * self._plain(self.normalized_from))
        return self.num_samples / math.sqrt(global_batch * self.normalized_from)

    def _plain(self, global_batch: float) -> float:
        """Return g (1-m)/ε of gradients that are not normalized."""
        return self.num_samples / global_batch - self.exact

    def _rest(self, momentum: float) -> float:
        """Return 1 - m of the decimal number that m was written as: near 1, floats would lose most of its digits.

        1 if gradients are averaged.
        """
        return 1.0 if self.averages_gradients else float(1 - decimal(momentum))
