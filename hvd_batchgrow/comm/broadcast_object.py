"""Broadcast an object made of tensors and plain values from rank 0."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.comm.int64_words import from_words, num_words, to_words
from hvd_batchgrow.comm.ranks import Ranks

MOST_WORDS = 1 << 25
"""Largest number of int64 in one broadcast: 256 MiB."""


def broadcast_object(ranks: Ranks, value: Any, name: str) -> Any:
    """Return rank 0's object on every rank. All ranks call it together.

    First a skeleton of the other values is broadcast, then the tensors in pieces: a rank needs little memory besides
    the object, and MPI counts at most 2³¹ numbers in a message.

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
        map_state(tensors.append, value)
        torch.save(map_state(lambda tensor: tensor.detach().to("meta"), value), file)
    data = ranks.broadcast_bytes(file.getvalue(), f"{name}.skeleton")
    skeleton = torch.load(io.BytesIO(data), weights_only=True)
    shapes: list[Tensor] = []
    map_state(shapes.append, skeleton)
    received: list[Tensor] = []
    for group in _groups([num_words(shape) for shape in shapes]):
        words = torch.empty(sum(num_words(shapes[k]) for k in group), dtype=torch.int64)
        parts = words.split([num_words(shapes[k]) for k in group])
        if ranks.rank == 0:
            for k, part in zip(group, parts, strict=True):
                part.copy_(to_words(tensors[k]))
        for piece in words.split(MOST_WORDS) if len(words) else ():
            ranks.broadcast(piece, f"{name}.tensors")
        if ranks.rank:
            received += [from_words(part, _like(shapes[k])) for k, part in zip(group, parts, strict=True)]
    if ranks.rank == 0:
        return value
    found = iter(received)
    return map_state(lambda _: next(found), skeleton)


def _groups(sizes: Sequence[int]) -> Iterator[range]:
    """Yield consecutive tensors that are broadcast together: at most `MOST_WORDS`, or one larger tensor."""
    first, total = 0, 0
    for k, size in enumerate(sizes):
        if k > first and total + size > MOST_WORDS:
            yield range(first, k)
            first, total = k, 0
        total += size
    if sizes:
        yield range(first, len(sizes))


def _like(meta: Tensor) -> Tensor:
    return torch.empty_like(meta, device="cpu")


def map_state(function: Callable[[Tensor], Any], state: Any) -> Any:
    """Return a copy of a state of dicts, lists, tuples and plain values; a function replaces each tensor."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        changed = copy.copy(state)  # keeps the class of an OrderedDict, and the versions in a module's state dict
        changed.update({key: map_state(function, part) for key, part in state.items()})
        return changed
    if not isinstance(state, (list, tuple)):
        return state
    parts = [map_state(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
