"""A loss scale for float16, in which most unscaled gradients would underflow."""

from __future__ import annotations

from dataclasses import dataclass

_LARGEST, _SMALLEST = 2.0**24, 1.0


@dataclass
class LossScale:
    """The factor by which the mean loss of a ghost batch is multiplied before the backward pass.

    When a gradient overflows, the scale is halved and the update is skipped. After `growth_updates` updates without
    an overflow the scale is doubled, as in torch's GradScaler. It counts updates, not samples, although everything
    else of a schedule counts samples: each doubling may cost an update, and a grown batch would otherwise lose more
    of its few large updates. All ranks have the same summed gradient, so they agree without communication.

    Args:
        value: a power of two, so that scaling rounds nothing.
        good_updates: updates since the last overflow or doubling.
        growth_updates: updates without an overflow before a doubling.

    Source: Micikevicius et al. 2018, "Mixed precision training" (arXiv 1710.03740), §3.2; the numbers are those of
    torch.amp.GradScaler.
    """

    value: float = 2.0**16
    good_updates: int = 0
    growth_updates: int = 2000

    def per_sample(self, ghost_batch: int) -> float:
        """Return the factor for the loss of one sample: the value over γ, rounded so that it is a power of two."""
        return self.value / (1 << (ghost_batch.bit_length() - 1))

    def after(self, *, overflow: bool) -> bool:
        """Adjust the scale after an update.

        Returns:
            Whether the update overflows because of the scale; False if the scale cannot be halved further.
        """
        if overflow:
            is_to_blame = self.value > _SMALLEST
            self.value, self.good_updates = max(_SMALLEST, self.value / 2), 0
            return is_to_blame
        self.good_updates += 1
        if self.good_updates >= self.growth_updates and self.value < _LARGEST:
            self.value, self.good_updates = self.value * 2, 0
        return False
