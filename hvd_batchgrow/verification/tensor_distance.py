"""How far two tensors are from each other, in the 2-norm."""

from __future__ import annotations

import torch
from torch import Tensor


def distance(first: Tensor, second: Tensor) -> float:
    """Return |a - b|. Equal infinities count as equal, and so do two NaNs; NaN if only one value of a pair is."""
    kind = torch.promote_types(first.dtype, torch.float64)
    first, second = first.to(kind), second.to(kind)
    is_equal = (first == second) | (first.isnan() & second.isnan())
    return float(torch.where(is_equal, 0, second - first).norm().abs())


def norm(values: Tensor) -> float:
    """Return the 2-norm of the finite values: a mask may contain infinities."""
    return distance(values, torch.where(values.isfinite(), 0, values))
