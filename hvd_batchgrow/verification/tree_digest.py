"""A digest of tensors and plain values that is the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def tree_digest(tree: Any) -> str:
    """Return a SHA-256 of a tree of dicts, lists, tensors and plain values, the same on every machine.

    Dicts are hashed in the order of their keys, and tensors by path, dtype, shape and bytes in C order.
    """
    digest = hashlib.sha256()
    for piece in _pieces("", tree):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: str, value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _pieces(f"{path}/{key}", value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{path}[{len(value)}]\0".encode()
        for index, item in enumerate(value):
            yield from _pieces(f"{path}/{index}", item)
    elif isinstance(value, Tensor):
        yield f"{path}:{value.dtype}{tuple(value.shape)}\0".encode()
        # The tensor's memory without a copy: a copy would hold Python's lock, and training would wait.
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    else:
        yield f"{path}={value!r}\0".encode()
