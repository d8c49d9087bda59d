"""Lists of tensors that one call processes together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T", bound=Tensor)


def parts_of_size(tensors: Iterable[T], num_bytes: int) -> list[list[T]]:
    """Split tensors into parts of one type and device, in order, each of at most `num_bytes` or one larger tensor."""
    parts: list[list[T]] = []
    room = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not parts or size > room or (tensor.dtype, tensor.device) != (parts[-1][0].dtype, parts[-1][0].device):
            parts.append([])
            room = num_bytes
        parts[-1].append(tensor)
        room -= size
    return parts
