"""Tensors of any type as int64 words, which every backend can broadcast and sum."""

from __future__ import annotations

import torch
from torch import Tensor


def num_words(like: Tensor) -> int:
    """Return the length of `to_words` of a tensor."""
    return -(-like.nbytes // 8)


def to_words(value: Tensor) -> Tensor:
    """Return the bytes of a tensor in C order as int64 (num_words,) on the CPU, padded with zeros."""
    found = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    words = torch.zeros(num_words(value), dtype=torch.int64)
    words.view(torch.uint8)[: len(found)] = found
    return words


def from_words(words: Tensor, like: Tensor) -> Tensor:
    """Invert `to_words`; the result has the shape, type, device and memory format of `like`."""
    found = words.clone().view(torch.uint8)[: like.nbytes].view(like.dtype).view(like.shape)
    return torch.empty_like(like).copy_(found)
