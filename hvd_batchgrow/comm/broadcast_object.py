"""Broadcast a tree of tensors and plain values from rank 0."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import Ranks

_MARK = "__tensor__"
"""First item of the tuple that stands for a tensor; its index, type and shape follow."""


def broadcast_tree(ranks: Ranks, tree: Any, name: str) -> Any:
    """Return rank 0's tree on every rank. All ranks call it together.

    The tensors are broadcast as one flat CPU tensor per type, and the other values as bytes.

    Args:
        ranks: of the job.
        tree: dicts, lists and tuples of tensors and plain values; ignored on ranks other than 0.
        name: of the collective.

    Returns:
        on rank 0 the tree itself; elsewhere an equal tree whose tensors are on the CPU.
    """
    tensors: list[Tensor] = []
    skeleton = _replace(tree, lambda value: isinstance(value, Tensor), lambda value: _mark(value, tensors))
    data = ranks.broadcast_bytes(_to_bytes(skeleton) if ranks.rank == 0 else None, f"{name}.skeleton")
    skeleton = torch.load(io.BytesIO(data or b""), weights_only=True)
    marks: list[tuple[Any, ...]] = []
    _replace(skeleton, _is_mark, marks.append)
    values: dict[int, Tensor] = {}
    for dtype in sorted({mark[2] for mark in marks}):
        alike = [mark for mark in marks if mark[2] == dtype]
        sizes = [torch.Size(mark[3]).numel() for mark in alike]
        flat = torch.empty(sum(sizes), dtype=getattr(torch, dtype))
        if ranks.rank == 0:
            torch.cat([tensors[mark[1]].detach().reshape(-1).cpu() for mark in alike], out=flat)
        ranks.broadcast_values(flat, f"{name}.{dtype}")
        parts = flat.split(sizes)
        values |= {mark[1]: part.view(mark[3]).clone() for mark, part in zip(alike, parts, strict=True)}
    return tree if ranks.rank == 0 else _replace(skeleton, _is_mark, lambda mark: values[mark[1]])


def _mark(tensor: Tensor, tensors: list[Tensor]) -> tuple[Any, ...]:
    tensors.append(tensor)
    return _MARK, len(tensors) - 1, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _is_mark(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 4 and value[0] == _MARK


def _replace(tree: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    if is_leaf(tree):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _replace(value, is_leaf, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_replace(value, is_leaf, change) for value in tree)
    return tree


def _to_bytes(skeleton: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(skeleton, buffer)
    return buffer.getvalue()
