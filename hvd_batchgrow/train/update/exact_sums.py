"""Sums that do not depend on their order, so that they are bit-identical in all layouts."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_COARSE, _FINE = 2.0**-33, 2.0**-70
LIMIT = 2.0**18
"""The sum of the absolute values must stay below this; then all partial sums are exact too."""


def split(values: Tensor) -> Tensor:
    """Write each value as a multiple of 2⁻³³ plus a multiple of 2⁻⁷⁰.

    Multiples of 2⁻³³ below 2¹⁹ fit into the 53 bits of a float64, and so do multiples of 2⁻⁷⁰ below
    2⁻¹⁷, which is 2¹⁷ fine parts. Adding such numbers rounds nothing, so the sum of the parts is the
    same in any order, over any micro-batches and ranks. Digits below 2⁻⁷⁰ are rounded off before the
    addition, separately for each value, and therefore identically everywhere.

    The largest absolute value is appended to the values. The sum of the largest values bounds the sum
    of absolute values at each index, and therefore every partial sum.

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
    """Return the sums of the values, float64 (…, n), from sums (2, …, n+1) of their parts.

    A sum that includes a value that is not finite is not finite.

    Raises:
        OverflowError: see `check_range`.
    """
    check_range([float(largest(sums))])
    return join_unchecked(sums)


def join_unchecked(sums: Tensor) -> Tensor:
    """Return what `join` returns without reading a value; the caller passes `largest` of the sums to `check_range`."""
    return (sums[0] + sums[1])[..., :-1]


def largest(sums: Tensor) -> Tensor:
    """Return the largest sum of absolute values, float64 (), which bounds every partial sum."""
    return sums[0, ..., -1].max()


def check_range(values: Iterable[float]) -> None:
    """Raise OverflowError if a sum may have left the range in which adding is exact, in whatever order.

    Args:
        values: `largest` of each of the sums.
    """
    for value in values:
        if LIMIT <= value < math.inf:
            raise OverflowError(f"a sum of absolute values is {value:.3g}; in exact mode it must be below {LIMIT:.0f}")


def _round_to(values: Tensor, grid: float) -> Tensor:
    # At 1.5 · 2⁵² grid points a float64 has no finer digits, so adding and subtracting it rounds to the grid.
    far = 1.5 * 2.0**52 * grid
    return (values + far) - far
