"""A loss scale for float16, whose smallest numbers would swallow most gradients."""

from __future__ import annotations

from dataclasses import dataclass

_LARGEST, _SMALLEST = 2.0**24, 1.0


@dataclass
class LossScale:
    """What the loss is multiplied by before the backward pass, and the gradient divided by after it.

    Halved when a gradient overflows, whose update is then left out; doubled after `growth_samples`
    samples without an overflow: counted in samples, so that it does not depend on the batch. All
    ranks see the same summed gradient, and so agree on it without a word.

    Args:
        value: a power of two, so that scaling rounds nothing.
        good_samples: since the last overflow or doubling.
        growth_samples: until the next doubling.

    Source: Micikevicius et al. 2018, "Mixed precision training" (arXiv 1710.03740), §3.2.
    """

    value: float = 2.0**15
    good_samples: int = 0
    growth_samples: int = 1 << 17

    def after(self, samples: int, *, overflow: bool) -> bool:
        """Take note of an update of so many samples.

        Returns:
            whether it overflows and the scale may be to blame: not so where there is none left.
        """
        if overflow:
            is_to_blame = self.value > _SMALLEST
            self.value, self.good_samples = max(_SMALLEST, self.value / 2), 0
            return is_to_blame
        self.good_samples += samples
        if self.good_samples >= self.growth_samples and self.value < _LARGEST:
            self.value, self.good_samples = self.value * 2, 0
        return False
