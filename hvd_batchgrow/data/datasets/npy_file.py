"""Memory-mapped .npy files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError, unreadable


def open_npy(path: Path) -> NDArray[Any]:
    """Map a .npy file, read-only; pickles are never loaded.

    Raises:
        RunError: it is not a .npy file, contains objects, has a wrong length, or is not in C order.
    """
    try:
        shape, fortran_order, dtype, body_start = _read_header(path)
        if dtype.hasobject:
            raise RunError(f"{path} contains Python objects, which are pickles and not read: save plain numbers")
        expected, found = body_start + math.prod(shape) * dtype.itemsize, path.stat().st_size
        if found != expected:
            state = "truncated" if found < expected else "damaged"
            raise RunError(f"{path} is {state}: {found} bytes, {expected} expected for {shape} of {dtype}")
        if fortran_order and len(shape) > 1:
            remedy = "save it with numpy.save(…, numpy.ascontiguousarray(…))"
            raise RunError(f"{path} is in Fortran order, which scatters each sample over the file; {remedy}")
        if not expected - body_start:
            raise RunError(f"{path} is empty: {shape} of {dtype}")
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:  # ValueError: negative numbers in the shape
        raise unreadable(path, error) from None


def _read_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    with path.open("rb") as file:
        start = file.read(6)
        if start != b"\x93NUMPY":
            raise RunError(f"{path} is not a .npy file: it starts with {start.hex(' ') or 'nothing'}")
        file.seek(0)
        try:
            version = npy.read_magic(file)
            # Versions 2 and 3 differ only in the encoding of field names, which files of numbers do not have.
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            return *read(file), file.tell()
        except Exception as error:  # the header is Python syntax: damage may raise any exception
            raise RunError(f"{path} is damaged in its header: {error}") from None
