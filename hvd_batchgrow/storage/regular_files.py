"""Read files that another program may have replaced by a pipe or device."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import BinaryIO


def read_regular(path: Path) -> bytes:
    """Return the bytes of a file. A pipe or device is not read: it may never deliver any.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        return file.read()


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes; like `read_regular`, which reads all of them."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # for a folder the system reports a clear error
        raise OSError(errno.EINVAL, "a pipe or device, where a file is needed", str(path))
    return path.open("rb")
