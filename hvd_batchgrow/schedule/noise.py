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
    normalized gradients:               g = ε N / (√(B B₀) (1-m)), for Adam under Seesaw's rule,
                                        whose step does not shrink with the gradient's noise

    Growing the batch and decaying the learning rate both lower it. ε is the learning
    rate, m the momentum, B the global batch in samples, B₀ the first one, N the training-set size.

    Args:
        num_samples: N.
        exact: use the exact form.
        normalized_from: B₀ for the form of normalized gradients; None for the other forms.

    Source: Smith & Le 2017 (arXiv 1710.06451); Smith et al. 2018 (arXiv 1711.00489), §2 and §4.
    """

    num_samples: int
    exact: bool = False
    normalized_from: int | None = None

    def of(self, lr: float, momentum: float, global_batch: float) -> float:
        """Return the noise scale."""
        return lr / _rest(momentum) * self._per_lr(global_batch)

    def lr_for(self, noise: float, momentum: float, global_batch: float) -> float:
        """Return the learning rate that gives a noise scale."""
        return noise * _rest(momentum) / self._per_lr(global_batch)

    def batch_for(self, noise: float, momentum: float, lr: float) -> float:
        """Return the batch, in samples and not rounded, that gives a noise scale."""
        wanted = noise * _rest(momentum) / lr
        if self.exact:
            return self.num_samples / (1 + wanted)
        if self.normalized_from:
            return (self.num_samples / wanted) ** 2 / self.normalized_from
        return self.num_samples / wanted

    def _per_lr(self, global_batch: float) -> float:
        """Return g (1-m)/ε."""
        if self.exact:
            return self.num_samples / global_batch - 1
        if self.normalized_from:
            return self.num_samples / math.sqrt(global_batch * self.normalized_from)
        return self.num_samples / global_batch


def _rest(momentum: float) -> float:
    """Return 1 - m of the decimal number that m was written as: near 1, floats would lose most of its digits."""
    return float(1 - decimal(momentum))
