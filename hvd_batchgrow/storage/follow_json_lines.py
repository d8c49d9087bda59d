"""Follow a file of JSON lines that another process appends to or replaces."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hvd_batchgrow.storage.json_lines import Line

_CHUNK_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 1 << 26
"""Longer lines are skipped, so that a damaged file does not fill the memory."""


class JsonLinesFollower:
    """Reads the new lines of a file, each byte once, also over NFS. The file may not exist yet.

    A line counts when its newline has been written. Lines that are not objects with a sample counter, or whose
    counter is lower than that of the line before, are skipped.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        """Start of a line whose end is not written yet."""
        self._samples = 0
        self.bytes_read = 0

    def reopened(self) -> bool:
        """Open the file, also again if it was replaced or cut; return whether the lines read so far are invalid."""
        try:
            now = self._path.stat()
        except OSError:  # removed, or not there yet
            had_lines, self._samples = self._samples > 0, 0
            self.close()
            return had_lines
        if self._is_same(now) or not stat.S_ISREG(now.st_mode):
            return False
        was_read = self._file is not None or self._samples > 0
        self.close()
        try:
            # The file stays open, so that its inode number is not reused.
            self._file = self._path.open("rb", buffering=0)
        except OSError:
            return False
        self._samples = 0
        return was_read

    def _is_same(self, now: os.stat_result) -> bool:
        try:
            file = self._file
            return file is not None and os.path.samestat(os.fstat(file.fileno()), now) and now.st_size >= file.tell()
        except OSError:  # a stale handle of NFS: the file was replaced
            return False

    def lines(self) -> Iterator[Line]:
        """Yield the lines that have been completed since the last call."""
        while self._file is not None and (chunk := self._read(self._file)):
            *complete, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > _LONGEST_LINE_BYTES:
                self._rest = b""
            for text in complete:
                if (line := _parsed(text)) is not None and line["samples"] >= self._samples:
                    self._samples = line["samples"]
                    yield line

    def _read(self, file: BinaryIO) -> bytes:
        try:
            chunk = file.read(_CHUNK_BYTES)
        except OSError:  # a stale handle of NFS: the file was replaced
            self.close()
            return b""
        self.bytes_read += len(chunk)
        return chunk

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and type(line.get("samples")) is int and 0 <= line["samples"] < 2**62
    return line if is_line else None
