"""Broadcast an object made of tensors and plain values from rank 0."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.comm.int64_words import from_words, num_words, to_words
from hvd_batchgrow.comm.ranks import Ranks


def broadcast_object(ranks: Ranks, value: Any, name: str) -> Any:
    """Return rank 0's object on every rank. All ranks call it together.

    All tensors are broadcast together, after a skeleton of the other values.

    Args:
        ranks: of the job.
        value: dicts, lists and tuples of tensors and plain values; ignored on ranks other than 0.
        name: of the collectives.

    Returns:
        on rank 0 the object itself; elsewhere an equal object whose tensors are on the CPU.
    """
    if ranks.size == 1:
        return value
    tensors: list[Tensor] = []
    file = io.BytesIO()
    if ranks.rank == 0:
        map_tensors(value, tensors.append)
        torch.save(map_tensors(value, lambda tensor: tensor.detach().to("meta")), file)
    data = ranks.broadcast_bytes(file.getvalue(), f"{name}.skeleton") or b""
    skeleton = torch.load(io.BytesIO(data), weights_only=True)
    sizes: list[int] = []
    map_tensors(skeleton, lambda meta: sizes.append(num_words(meta)))
    words = torch.empty(sum(sizes), dtype=torch.int64)
    parts = iter(words.split(sizes))
    for tensor in tensors:
        next(parts).copy_(to_words(tensor))
    if sizes:
        ranks.broadcast(words, f"{name}.tensors")
    if ranks.rank == 0:
        return value
    return map_tensors(skeleton, lambda meta: from_words(next(parts), torch.empty_like(meta, device="cpu")))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a copy of dicts, lists, tuples and plain values in which a function has replaced each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # keeps the class of an OrderedDict, and the versions in a module's state dict
        changed.update({key: map_tensors(item, change) for key, item in value.items()})
        return changed
    return type(value)(map_tensors(item, change) for item in value) if isinstance(value, (list, tuple)) else value
