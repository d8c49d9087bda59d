"""Trees of tensors: inputs and targets of networks that take more than one tensor.

A tree is a tensor, or a dict, list, tuple or named tuple of trees. Each tensor has one row per sample.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.comm.to_device import to_device

Tree = Any
"""A tensor, or a dict, list, tuple or named tuple of trees."""


def map_tensors(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply a function to each tensor of a tree, and return the results as a tree of the same form.

    Args:
        function: called with the tensors at the same place in all trees.
        tree: gives the form.
        others: trees of the same form.
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: map_tensors(function, part, *(other[key] for other in others)) for key, part in tree.items()}
    parts = [map_tensors(function, *same) for same in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def tensors_in(tree: Tree) -> Iterator[Tensor]:
    """Yield the tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for part in tree.values() if isinstance(tree, dict) else tree:
        yield from tensors_in(part)


def join_rows(trees: Sequence[Tree]) -> Tree:
    """Concatenate trees of the same form along the samples; a single tree is returned as it is."""
    return map_tensors(lambda *parts: torch.cat(parts), *trees) if len(trees) > 1 else trees[0]


def take_rows(tree: Tree, rows: slice | Sequence[int]) -> Tree:
    """Return some samples of a tree."""
    return map_tensors(lambda tensor: tensor[rows], tree)


def has_rows(tree: Any, count: int) -> bool:
    """Return whether `take_rows` returns the samples of an object: it is a tree whose tensors have `count` rows.

    A subclass of dict may have attributes, which `take_rows` would drop.
    """
    if isinstance(tree, Tensor):
        return tree.dim() > 0 and len(tree) == count
    if type(tree) in {dict, OrderedDict}:
        return all(has_rows(part, count) for part in tree.values())
    return isinstance(tree, (tuple, list)) and all(has_rows(part, count) for part in tree)


def num_rows(tree: Tree) -> int:
    """Return the number of samples of a tree."""
    return len(next(tensors_in(tree)))


def device_of(tree: Tree) -> torch.device:
    """Return the device of a tree's first tensor."""
    return next(tensors_in(tree)).device


def moved(tree: Tree, device: torch.device) -> Tree:
    """Copy a tree from the host to a device without waiting."""
    return map_tensors(lambda tensor: to_device(tensor, device), tree)


def form_of(tree: Any) -> str:
    """Return types and shapes of one sample, such as `float32 (3, 8, 8)` or `{'ids': int64 (16,)}`.

    An object that is not a tree is described by its type.
    """
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape[1:])}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {form_of(part)}" for key, part in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        return "[" + ", ".join(map(form_of, tree)) + "]"
    return type(tree).__name__


def bit_identical(ours: Tree, theirs: Tree) -> bool:
    """Return whether two trees are bit-identical: forms, types and values, where NaN equals NaN."""
    if form_of(ours) != form_of(theirs):
        return False
    pairs = zip(tensors_in(ours), tensors_in(theirs), strict=True)
    return all(torch.equal(a, b) or _bytes(a) == _bytes(b) for a, b in pairs)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
