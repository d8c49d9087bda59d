"""Find and map files of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.cache import file_stamp
from hvd_batchgrow.data.datasets.npy_file import open_npy
from hvd_batchgrow.data.datasets.section_values import need_root
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, unreadable
from hvd_batchgrow.messages.suggest import near_path

_TYPES = ("uint8", "uint16", "uint32", "int32", "int64")
"""Types of tokens in .npy files."""
_HOW = "numpy.array(ids, numpy.uint16).tofile({!r}) writes one"


def num_windows(num_tokens: int, context: int) -> int:
    """Return the number of windows in which every token but the first is a target: ⌈(T - 1) / L⌉.

    Args:
        num_tokens: T, at least 2.
        context: L.
    """
    return -(-(num_tokens - 1) // context)


def find_file(data: DataSection, part: Literal["train", "test"]) -> Path:
    """Return the file of a set below `data.root`: `data.train` or `data.test`, or the one of the usual names.

    Raises:
        JobError: the job has no root.
        RunError: the file is missing, or there are two.
    """
    root = need_root(data, "the folder of its files of tokens")
    given: str | None = getattr(data, part)
    if given is not None:
        path = root / given
        if not path.exists():
            raise RunError(f"data.{part} = {given!r}: {path} does not exist{near_path(path)}; {_HOW.format(given)}")
        return path
    names = [f"{part}.bin", f"{part}.npy"]
    found = [root / name for name in names if (root / name).exists()]
    if len(found) == 2:
        raise RunError(f"{root} contains both {' and '.join(names)}: remove one, or name one with data.{part}")
    if not found:
        remedy = f"{_HOW.format(names[0])}, or data.{part} names another file"
        raise RunError(f"{root} holds neither {' nor '.join(names)}: {remedy}")
    return found[0]


def open_tokens(path: Path, token_dtype: str | None) -> NDArray[Any]:
    """Map a file of tokens, read-only.

    Args:
        path: a .npy file (T,) of integers, or a flat file.
        token_dtype: `data.token_dtype`: the type of a flat file; None for .npy.

    Raises:
        JobError: `token_dtype` is missing for a flat file, or contradicts a .npy file.
        RunError: the file is empty, is truncated, or has a wrong type or shape.
    """
    if path.suffix == ".npy":
        return _open_npy(path, token_dtype)
    if token_dtype is None:
        fault = f"is needed: {path.name} does not say its type; 'uint16' is usual for vocabularies of up to 65536"
        raise JobError([Fault("data.token_dtype", fault)])
    dtype = np.dtype(token_dtype).newbyteorder("<")
    ((_, size, _),) = file_stamp(path)
    if not size:
        raise RunError(f"{path} is empty")
    if size % dtype.itemsize:
        fault = f"{path} has {size} bytes, which is not a multiple of the {dtype.itemsize} bytes of {token_dtype}"
        raise RunError(f"{fault}: it is truncated, or data.token_dtype is another")
    try:
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise unreadable(path, error) from None


def _open_npy(path: Path, token_dtype: str | None) -> NDArray[Any]:
    file_stamp(path)
    tokens = open_npy(path)
    if tokens.ndim != 1 or tokens.dtype.newbyteorder("=") not in map(np.dtype, _TYPES):
        fault = f"{path} is {tokens.dtype} {tokens.shape}; tokens must be (T,) of {', '.join(_TYPES)}"
        raise RunError(f"{fault}: numpy.save(…, numpy.asarray(tokens, numpy.uint16).reshape(-1))")
    if token_dtype not in {None, tokens.dtype.name}:
        fault = f"{token_dtype!r}, and {path.name} says {tokens.dtype.name}; remove the key, which is for other files"
        raise JobError([Fault("data.token_dtype", fault)])
    return tokens
