"""IDX, the file format of the MNIST family."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.errors import RunError

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path, sha256: str | None = None) -> NDArray[Any]:
    """Read an IDX file, gzipped or not.

    The header is two zero bytes, a type code, the number of dimensions, and each dimension as a
    big-endian int32; the values follow in C order.

    Args:
        path: the file; a name ending in .gz is unpacked.
        sha256: of the unpacked bytes; None: not checked.

    Raises:
        RunError: missing, damaged, truncated, or not the file that the digest names.
    """
    raw = _read_bytes(path)
    if sha256 and (found := hashlib.sha256(raw).hexdigest()) != sha256:
        mend = "remove its folder to have it fetched anew"
        raise RunError(f"{path} is not the file expected: SHA-256 {found[:16]}…, should be {sha256[:16]}…; {mend}")
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _DTYPES:
        raise RunError(f"{path} is no IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}")
    dtype, body_start = np.dtype(_DTYPES[raw[2]]), 4 + 4 * raw[3]
    if len(raw) < body_start:
        raise RunError(f"{path} is truncated: its header alone would be {body_start} bytes, it has {len(raw)}")
    shape = tuple(int(n) for n in np.frombuffer(raw[4:body_start], ">i4"))
    body, expected = memoryview(raw)[body_start:], math.prod(shape) * dtype.itemsize
    if len(body) != expected:
        raise RunError(f"{path} is truncated or damaged: {len(body)} bytes of values, {expected} expected for {shape}")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_bytes(path: Path) -> bytearray:
    try:
        # A bytearray, so that the arrays made of it are writable, as torch wants them.
        data = path.read_bytes()
        return bytearray(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
