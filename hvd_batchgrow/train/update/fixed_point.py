"""Sums of gradients in fixed point: integers, which add up to the same sum in any order.

Each ghost batch's gradient g is rounded once, to a multiple of 2^-e, and added as the integer g 2^e. The exponent e is
equal in all layouts: it follows from the gradients of the update before. If a gradient does not fit, all layouts notice
it in the same update, and repeat the update with another exponent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvd_batchgrow.config.layout import MOST_EXACT_GHOST_BATCHES

_BITS = 62
"""The sum of the absolute values stays below 2⁶², so that no partial sum overflows an int64."""
_HEADROOM = 8
"""The gradients may become 2⁸ times larger from one update to the next without a repetition."""
_FEWEST_BITS = 32
"""Bits of the largest value of a ghost batch, on average over the ghost batches of an update. With fewer, the update is
repeated. Values down to 2⁻⁷ of the largest are then rounded more finely than by float32."""
_COARSE = 20
"""The largest value is added in units of 2²⁰, so that its sum over 2²⁰ ghost batches fits even if each is too large."""
_TOO_LARGE = 1 << _BITS - _COARSE
_CHUNK = 1 << 16


class FixedPointSum:
    """The sum of a bucket's gradients over the ghost batches of an update.

    Args:
        like: the gradients, flat (n,).
    """

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros(len(like) + 1, dtype=torch.int64, device=like.device)
        """The sum, to all-reduce: int64 (n + 1,). The last number is that of the largest absolute values."""
        self.magnitude = 0
        """log2 of the largest absolute value of a ghost batch's gradient, rounded up, as far as it is known. If it is
        too far off, the next update is repeated."""
        self._mean_magnitude: int | None = None
        """That of the mean over the ghost batches; None: the sum has left its range."""
        self._exponent = 0
        self._num_ghost_batches = 1
        self._largest: Tensor | None = None

    def begin(self, num_ghost_batches: int) -> None:
        """Begin an update of this number of ghost batches, at most `MOST_EXACT_GHOST_BATCHES`."""
        assert num_ghost_batches <= MOST_EXACT_GHOST_BATCHES
        self.total.zero_()
        self._num_ghost_batches, self._largest = num_ghost_batches, None
        self._exponent = _BITS - _HEADROOM - self.magnitude - (num_ghost_batches - 1).bit_length()

    def empty_copy(self) -> FixedPointSum:
        """Return a sum without values, for the same update: equal gradients give equal integers."""
        copy = FixedPointSum(self.total[:-1])
        copy._num_ghost_batches, copy._exponent = self._num_ghost_batches, self._exponent
        return copy

    def add(self, values: Tensor) -> None:
        """Add a ghost batch's gradient, floating point (n,)."""
        scale = 2.0**self._exponent
        chunk = _CHUNK if values.device.type == "cpu" else max(1, len(values))  # on a CPU, the size of a cache
        for part, sums in zip(values.split(chunk), self.total[:-1].split(chunk), strict=True):
            sums.add_((part.double() * scale).round_().long())
        low, high = torch.aminmax(values)
        largest = torch.maximum(-low, high).double()
        self._largest = largest if self._largest is None else torch.maximum(largest, self._largest)
        coarse = (largest * (scale / (1 << _COARSE))).ceil_()
        self.total[-1].add_(coarse.nan_to_num_(_TOO_LARGE, _TOO_LARGE).clamp_(max=_TOO_LARGE).long())

    def values(self) -> Tensor:
        """Return the sum, float64 (n,)."""
        return self.total[:-1].double().mul_(2.0**-self._exponent)

    def end(self, summed: float) -> bool:
        """Return whether the sum of an update is right, and note the magnitude of its gradients for the next one.

        Args:
            summed: the last number of the total over all ranks; 0 if all gradients are 0.
        """
        self._mean_magnitude = None
        if not 0 <= summed < _TOO_LARGE:
            return False
        if not summed:
            return True
        bits = math.frexp(summed / self._num_ghost_batches)[1] + _COARSE
        self.magnitude = self._mean_magnitude = bits - self._exponent
        return bits >= _FEWEST_BITS

    @property
    def largest_word(self) -> int:
        """The largest absolute value that this rank has added, as the bits of a float64, whose order is the same."""
        # Without the sign: that of NaN is arbitrary, and zero may be -0.
        return 0 if self._largest is None else int(self._largest.view(torch.int64)) & (2**63 - 1)

    def resize(self, word: int) -> bool:
        """Note the magnitude of the gradients of an update that is not right and is repeated.

        If few of many ghost batches have gradients, the mean counts, because it decides how many bits there are.

        Args:
            word: the largest `largest_word` of all ranks.

        Returns:
            Whether that value is finite.
        """
        largest = torch.tensor(word).view(torch.float64).item()
        if not math.isfinite(largest):
            return False
        if largest:
            magnitude = math.frexp(largest)[1]
            self.magnitude = magnitude if self._mean_magnitude is None else min(magnitude, self._mean_magnitude)
        return True
