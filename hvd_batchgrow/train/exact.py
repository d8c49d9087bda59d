"""Sums that do not depend on their order, so that no layout can change a bit of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_COARSE, _FINE = 2.0**-33, 2.0**-70
LIMIT = 2.0**18
"""Sums must stay below this in absolute value."""


def split(values: Tensor) -> Tensor:
    """Write each value as a multiple of 2⁻³³ plus a multiple of 2⁻⁷⁰.

    Multiples of 2⁻³³ below 2¹⁹ fit into the 53 bits of a float64, and so do multiples of 2⁻⁷⁰ below
    2⁻¹⁷, which is 2¹⁷ fine parts. Adding such numbers rounds nothing: the sum of the parts is the
    same in any order, over any passes and ranks. What lies below 2⁻⁷⁰ is rounded off before it is
    added, value by value, and so in the same way everywhere.

    Args:
        values: floating point, any shape, absolute values below 2¹⁸.

    Returns:
        float64 (2, …): coarse and fine parts.

    Source: binned summation, after Demmel & Nguyen 2013, "Fast reproducible floating-point summation".
    """
    exact = values.double()
    coarse = _round_to(exact, _COARSE)
    return torch.stack((coarse, _round_to(exact - coarse, _FINE)))


def join(sums: Tensor) -> Tensor:
    """The sums of the values, float64 (…), from sums (2, …) of their parts; no number where a value is not finite.

    Raises:
        OverflowError: a sum has left the range in which adding is exact.
    """
    largest = float(sums[0].abs().max()) if sums.numel() else 0.0
    if LIMIT <= largest < math.inf:
        raise OverflowError(f"a sum of {largest:.3g} is beyond {LIMIT:.0f}, where exact mode ends")
    return sums[0] + sums[1]


def _round_to(values: Tensor, grid: float) -> Tensor:
    # 1.5 · 2⁵² grid points away a float64 has no finer digits: adding and subtracting it rounds to the grid.
    far = 1.5 * 2.0**52 * grid
    return (values + far) - far
