"""Sums of gradients in fixed point: integers that add up without rounding, in any order.

Each ghost batch's gradient g is rounded once, to a multiple of 2^-e, and added as the integer g 2^e. The exponent e is
equal in all layouts: it follows from the gradients of the update before. If a gradient does not fit, all layouts notice
it in the same update, and repeat the update with another exponent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = 62
"""The sum of the absolute values stays below 2⁶², so that no partial sum overflows an int64."""
_HEADROOM = 8
"""The gradients may become 2⁸ times larger from one update to the next without a repetition."""
_FEWEST_BITS = 32
"""Bits of the largest value of a ghost batch, on average over the ghost batches of an update. With fewer, the update is
repeated, so that the rounding is always finer than that of float32."""
_COARSE = 20
"""The largest value is added in units of 2²⁰, so that the sum of 2²⁰ ghost batches that do not fit still does."""
_TOO_LARGE = 1 << _BITS - _COARSE
_MOST_GROUPS = 1 << _COARSE
_CHUNK = 1 << 16


class FixedPoint:
    """The exponent of the sums of one bucket of gradients.

    Args:
        size: log2 of the largest absolute value of a ghost batch's gradient, as far as it is known. The first update
            is repeated if it is too far off.
    """

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._exponent = 0
        self._num_groups = 1
        self._largest: Tensor | None = None

    def begin(self, num_groups: int) -> None:
        """Choose the exponent for an update of this number of ghost batches.

        Raises:
            ValueError: there are more than 2²⁰ ghost batches.
        """
        if num_groups > _MOST_GROUPS:
            raise ValueError(f"exact mode adds at most {_MOST_GROUPS:,} ghost batches per update, not {num_groups:,}")
        self._num_groups, self._largest = num_groups, None
        self._exponent = _BITS - _HEADROOM - self.size - (num_groups - 1).bit_length()

    def add(self, values: Tensor, total: Tensor) -> None:
        """Add a ghost batch's gradient.

        Args:
            values: floating point (n,).
            total: int64 (n + 1,), on the same device; the last number is the sum of the largest absolute values.
        """
        scale = 2.0**self._exponent
        chunk = _CHUNK if values.device.type == "cpu" else max(1, len(values))  # on a CPU, the size of a cache
        for part, sums in zip(values.split(chunk), total[:-1].split(chunk), strict=True):
            sums.add_((part.double() * scale).round_().long())
        largest = _largest(values)
        self._largest = largest if self._largest is None else torch.maximum(largest, self._largest)
        coarse = (largest * (scale / (1 << _COARSE))).ceil_()
        total[-1].add_(coarse.nan_to_num_(_TOO_LARGE, _TOO_LARGE).clamp_(max=_TOO_LARGE).long())

    def join(self, total: Tensor) -> Tensor:
        """Return the sums of the values, float64 (n,), from the integers that `add` and the all-reduce have summed."""
        return total[:-1].double().mul_(2.0**-self._exponent)

    def fits(self, summed: float) -> bool:
        """Return whether the sums of an update are right, and if so, note the size of its gradients for the next one.

        Args:
            summed: the last number of the total over all ranks; 0 if all gradients are 0.
        """
        if not 0 <= summed < _TOO_LARGE:
            return False
        bits = math.frexp(summed / self._num_groups)[1] + _COARSE
        if summed and bits >= _FEWEST_BITS:
            self.size = bits - self._exponent
        return summed == 0 or bits >= _FEWEST_BITS

    @property
    def largest_word(self) -> int:
        """The largest absolute value that this rank has added, as the bits of a float64, whose order is the same."""
        return 0 if self._largest is None else int(self._largest.view(torch.int64))

    def resize(self, word: int) -> bool:
        """Note the size of the gradients of an update that does not fit, which is then repeated.

        Args:
            word: the largest `largest_word` of all ranks.

        Returns:
            Whether that value is finite.
        """
        largest = torch.tensor(word).view(torch.float64).item()
        if largest and math.isfinite(largest):
            self.size = math.frexp(largest)[1]
        return math.isfinite(largest)


def _largest(values: Tensor) -> Tensor:
    """Return the largest absolute value, float64 (); NaN if one of them is."""
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high).double()
