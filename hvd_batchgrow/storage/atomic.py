"""Write a file or folder whole: after a crash, its name holds either the old content or the new content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hvd_batchgrow.messages.errors import unwritable

_UNFINISHED = ".writing"


class UnbufferedFile:
    """A file opened without a buffer, written in full and with the first error remembered.

    Args:
        file: an unbuffered binary file; its `write` may write only a part of the data.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
            raise
        return len(data)


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Replace a whole file, so that readers see the old content or the new one, also after a crash.

    If the path is a symbolic link, the file that it points to is replaced. A device or pipe is written, not replaced.
    The temporary name is fixed: only one process at a time may write the file. The next write replaces a temporary
    file that a killed process has left.

    Args:
        path: the file.
        content: the bytes, or a function that writes them into an unbuffered file.

    Raises:
        OSError: the file cannot be written. Its previous content is untouched.
    """
    if is_stream(path):
        with path.open("wb", buffering=0) as file:
            _write(file, content)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        with temporary.open("wb", buffering=0) as file:
            _write(file, content)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Like `write_atomically`; raises RunError if the file cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise unwritable(path, error) from error


def is_stream(path: Path) -> bool:
    """Return whether a path leads to a device or a pipe, such as /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _write(file: BinaryIO, content: bytes | Callable[[BinaryIO], None]) -> None:
    if isinstance(content, bytes):
        UnbufferedFile(file).write(content)
    else:
        content(file)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, fsync its contents, rename it, and fsync the folder that holds it.

    The temporary name is fixed, as in `write_atomically`.

    Args:
        folder: must be absent or empty when the block ends.

    Raises:
        OSError: the folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}{_UNFINISHED}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed process has left in a folder."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink()
