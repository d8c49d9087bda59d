"""A classifier whose weight is a fixed Hadamard matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LEAST_LENGTH = 1e-12
"""A shorter input is not divided by its length: its direction may be rounding, and its gradient would be huge."""


class HadamardClassifier(nn.Module):
    """y = s H x / |x| + c, with a fixed matrix H of 1 and -1, one learned scale s and a learned bias c per class.

    H has the first rows and columns of Sylvester's Hadamard matrix. It depends only on the shape, so it is a buffer
    that checkpoints do not contain. If the number of features is a power of two, its rows are orthogonal.

    Initial values: s = 1/sqrt(num_classes), as in the authors' code, and c = 0, where that code draws c uniformly from
    ±1/sqrt(num_classes).

    Shapes: input (n, width), output (n, num_classes) logits.

    Args:
        width: number of features.
        num_classes: number of classes.

    Raises:
        ValueError: num_classes exceeds `most_classes(width)`: two classes would have the same row of H.

    Source: Hoffer, Hubara & Soudry 2018 (arXiv 1801.04540).
    """

    weight: Tensor

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        if num_classes > (most := most_classes(width)):
            raise ValueError(
                f"a Hadamard matrix with {width} columns has {most} different rows, too few for {num_classes} classes: "
                f"classes 0 and {most} would have the same row; use a network with >= "
                f"{1 + _power_of_two(num_classes) // 2} features before its classifier, or 'linear'"
            )
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.scale = nn.Parameter(torch.full((1,), 1 / math.sqrt(num_classes)))
        self.register_buffer("weight", hadamard(num_classes, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of 16-bit numbers overflow
        lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        directions = x / lengths.masked_fill(lengths < _LEAST_LENGTH, 1)
        return nn.functional.linear((self.scale * directions).to(self.weight.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the arguments that `print(model)` shows."""
        num_classes, width = self.weight.shape
        return f"{width}, {num_classes}"


def hadamard(num_rows: int, num_columns: int) -> Tensor:
    """Return the first rows and columns of Sylvester's Hadamard matrix: 1 and -1, float32 (rows, columns).

    Sylvester's matrix of twice the size is [[H, H], [H, -H]]. So entry (i, k) is -1 to the power of the number of bits
    that are 1 in both i and k.
    """
    common = torch.arange(num_rows)[:, None] & torch.arange(num_columns)
    for shift in (32, 16, 8, 4, 2, 1):
        common ^= common >> shift  # in the end, the lowest bit is the parity
    return 1.0 - 2.0 * (common & 1)


def most_classes(width: int) -> int:
    """Return the number of different rows that Sylvester's matrix has in its first columns.

    It is the smallest power of two P >= width. Columns 1, 2, 4, …, P/2 are among the first columns. In column 2^j, the
    sign of entry (i, 2^j) is bit j of i, so rows 0 … P-1 differ. The index of a column is below P, so higher bits of i
    have no effect: rows k and k + P are equal.
    """
    return _power_of_two(width)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def fix_classifier(network: nn.Module) -> None:
    """Replace the linear classifier of a network by a Hadamard classifier. All other weights stay.

    Args:
        network: has an `nn.Linear` called classifier; changed in place.

    Raises:
        ValueError: it has more classes than a Hadamard matrix separates.
    """
    linear = network.get_submodule("classifier")
    assert isinstance(linear, nn.Linear)
    network.add_module("classifier", HadamardClassifier(linear.in_features, linear.out_features))
