"""A loss scale for float16, in which most unscaled gradients would underflow."""

from __future__ import annotations

from dataclasses import dataclass

_LARGEST, _SMALLEST = 2.0**24, 1.0


@dataclass
class LossScale:
    """The factor by which the loss is multiplied before the backward pass, and the gradient divided after it.

    When a gradient overflows, the scale is halved and the update is skipped. After `growth_samples`
    samples without an overflow the scale is doubled; counting samples makes this independent of the
    batch. All ranks have the same summed gradient, so they agree without communication.

    Args:
        value: a power of two, so that scaling rounds nothing.
        good_samples: samples since the last overflow or doubling.
        growth_samples: samples without an overflow before a doubling.

    Source: Micikevicius et al. 2018, "Mixed precision training" (arXiv 1710.03740), §3.2.
    """

    value: float = 2.0**15
    good_samples: int = 0
    growth_samples: int = 1 << 17

    def after(self, samples: int, *, overflow: bool) -> bool:
        """Adjust the scale after an update of `samples` samples.

        Returns:
            Whether the update overflows because of the scale; False if the scale cannot be halved further.
        """
        if overflow:
            is_to_blame = self.value > _SMALLEST
            self.value, self.good_samples = max(_SMALLEST, self.value / 2), 0
            return is_to_blame
        self.good_samples += samples
        if self.good_samples >= self.growth_samples and self.value < _LARGEST:
            self.value, self.good_samples = self.value * 2, 0
        return False
