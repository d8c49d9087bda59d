"""Files that somebody else may have put in their place."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def read_regular(path: Path) -> bytes:
    """The bytes of a file; a pipe or device, which may have none for ever, is not read.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system says so itself
        raise OSError(errno.EINVAL, "a pipe or device, where a file is needed", str(path))
    return path.read_bytes()
