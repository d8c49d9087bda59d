"""Files with one JSON object per line; each has a sample counter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import RunError, unreadable, unwritable
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import open_regular
from hvd_batchgrow.storage.strict_json import dump_json

Line = dict[str, Any]
_INT64 = range(-(2**63), 2**63)


class JsonLines:
    """A file that a run appends to. A resumed run first removes the lines that it will write again.

    Args:
        path: the file.
        keep: returns whether an existing line stays.
    """

    def __init__(self, path: Path, keep: Callable[[Line], bool]) -> None:
        kept = [line for line in read_json_lines(path, keep) if keep(line)]
        write_atomically(path, "".join(dump_json(line) + "\n" for line in kept).encode())
        self._path = path

    def append(self, line: Line) -> None:
        """Add a line. The file is not kept open, so the line survives a kill of the process.

        Raises:
            RunError: the file cannot be written, or was removed. It is not created again without its first lines.
        """
        try:
            with open(self._path, "a", encoding="utf-8", opener=_open_existing) as file:
                file.write(dump_json(line) + "\n")
        except OSError as error:
            raise unwritable(self._path, error) from None


def _open_existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def read_json_lines(path: Path, matters: Callable[[Line], bool] = lambda _: True) -> list[Line]:
    """Return the lines of a file, without a last line that a kill cut short. A missing file has no lines.

    Args:
        path: the file.
        matters: returns whether a line after an unreadable one is needed; lines that are not needed are skipped.

    Raises:
        RunError: the file cannot be read, a line is not an object with a sample counter, or a line that matters
            follows an unreadable one.
    """
    lines: list[Line] = []
    damaged = 0
    for number, line in scan_json_lines(path):
        if line is None:
            damaged = damaged or number
            continue
        if damaged and matters(line):
            raise RunError(f"{path} is damaged: line {damaged} cannot be read, but line {number} after it can")
        if not damaged:
            lines.append(line)
    return lines


def scan_json_lines(path: Path) -> Iterator[tuple[int, Line | None]]:
    """Yield the number and the content of each line of a file; None: the line is not JSON. A missing file has no lines.

    Raises:
        RunError: the file cannot be read, or a line is not an object with a sample counter.
    """
    for number, text in enumerate(_texts(path), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            yield number, None
            continue
        if not isinstance(line, dict) or type(line.get("samples")) is not int or line["samples"] not in _INT64:
            raise RunError(f"{path} is damaged: line {number} is not an object with a whole number of samples")
        yield number, line


def _texts(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without holding all of it in memory: a long run has a gigabyte of them."""
    try:
        if path.exists():
            with open_regular(path) as file:
                yield from file
    except OSError as error:
        raise unreadable(path, error) from None
