"""Sums that do not depend on their order, so that no layout can change a bit of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_COARSE, _FINE = 2.0**-33, 2.0**-70
LIMIT = 2.0**18
"""Absolute values must add up to less than this, on the way as in the end."""


def split(values: Tensor) -> Tensor:
    """Write each value as a multiple of 2⁻³³ plus a multiple of 2⁻⁷⁰.

    Multiples of 2⁻³³ below 2¹⁹ fit into the 53 bits of a float64, and so do multiples of 2⁻⁷⁰ below
    2⁻¹⁷, which is 2¹⁷ fine parts. Adding such numbers rounds nothing: the sum of the parts is the
    same in any order, over any passes and ranks. What lies below 2⁻⁷⁰ is rounded off before it is
    added, value by value, and so in the same way everywhere.

    The largest absolute value goes with them. These add up to no less than the absolute values in any
    one place do, and so than any sum on the way to theirs.

    Args:
        values: floating point (…, n), absolute values below 2¹⁸.

    Returns:
        float64 (2, …, n+1): coarse and fine parts; the last are those of the largest absolute value.

    Source: binned summation, after Demmel & Nguyen 2013, "Fast reproducible floating-point summation".
    """
    exact = values.new_empty((*values.shape[:-1], values.shape[-1] + 1), dtype=torch.float64)
    exact[..., :-1] = values
    exact[..., -1] = values.abs().amax(-1)
    coarse = _round_to(exact, _COARSE)
    return torch.stack((coarse, _round_to(exact - coarse, _FINE)))


def join(sums: Tensor) -> Tensor:
    """The sums of the values, float64 (…, n), from sums (2, …, n+1) of their parts; no number where one is not finite.

    Raises:
        OverflowError: a sum may have left the range in which adding is exact; whether it is raised does not
            depend on the order either.
    """
    largest = float(sums[0, ..., -1].max())
    if LIMIT <= largest < math.inf:
        raise OverflowError(f"a sum of {largest:.3g} in absolute values is beyond {LIMIT:.0f}, where exact mode ends")
    return (sums[0] + sums[1])[..., :-1]


def _round_to(values: Tensor, grid: float) -> Tensor:
    # 1.5 · 2⁵² grid points away a float64 has no finer digits: adding and subtracting it rounds to the grid.
    far = 1.5 * 2.0**52 * grid
    return (values + far) - far
