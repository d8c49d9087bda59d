"""The index of encoded images as arrays, which every rank maps from the cache."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.cache import Arrays


@dataclass(frozen=True, slots=True)
class Entry:
    """One encoded image, as returned by the reader of a format."""

    file: str
    """Path of its file, relative to the source's root."""
    offset: int
    """Start in the file, bytes."""
    length: int
    """Bytes."""
    label: int
    height: int
    """For this and the next four fields, see `ImageHeader`."""
    width: int
    orientation: int
    for_dali: bool
    fault: str
    head: int
    """CRC-32C of its first `encoded_dataset.HEAD_BYTES`."""
    member: str = ""
    """Its name inside a shard, for messages."""


def make_index(entries: Iterable[Entry]) -> Arrays:
    """Return the arrays of an index.

    Args:
        entries: one for each sample, in the order of the ids; entries of one file are adjacent. They are consumed
            one by one, so that a generator needs no memory beyond the arrays.
    """
    files, members, faults, last_file = _Texts(), _Texts(), _Texts(), None
    numeric = ("offset", "length", "label", "height", "width", "orientation", "for_dali", "head")
    columns = {name: array("q") for name in ("file", *numeric)}
    for entry in entries:
        if entry.file != last_file:
            files.append(entry.file)
            last_file = entry.file
        members.append(entry.member)
        faults.append(entry.fault)
        columns["file"].append(len(files) - 1)
        for name in numeric:
            columns[name].append(getattr(entry, name))
    numbers = {name: np.frombuffer(column, np.int64) for name, column in columns.items()}
    file_text, file_ends = files.arrays()
    member_text, member_ends = members.arrays()
    fault_text, fault_ends = faults.arrays()
    return {
        "files": file_text,
        "file_ends": file_ends,
        "file": numbers["file"].astype(np.int32),
        "members": member_text,
        "member_ends": member_ends,
        "faults": fault_text,
        "fault_ends": fault_ends,
        "offsets": numbers["offset"],
        "lengths": numbers["length"],
        "labels": numbers["label"],
        "heads": numbers["head"],
        "orientations": numbers["orientation"].astype(np.int8),
        "for_dali": numbers["for_dali"].astype(np.bool_),
        "sizes": np.stack([numbers["height"], numbers["width"]], axis=1).astype(np.int32),
    }


def text_at(blob: NDArray[np.uint8], ends: NDArray[np.int64], k: int) -> str:
    """Return the k-th of the concatenated texts of an index: `files` by `file_ends`, `members` by `member_ends`."""
    return os.fsdecode(blob[ends[k] : ends[k + 1]].tobytes())


class _Texts:
    """Many short texts, concatenated: an object for each text would take ten times the memory."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self._bytes += os.fsencode(text)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return np.frombuffer(self._bytes, np.uint8), np.frombuffer(self._ends, np.int64)
