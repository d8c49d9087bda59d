"""Arrays that are costly to make, kept between runs and shared by the ranks of a host."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.errors import RunError

Arrays = Mapping[str, NDArray[Any]]
_FORMAT = 2
"""Counted up when what a cache holds changes its meaning."""


def cache_folder() -> Path:
    """The user's cache of this project."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HVD_BATCHGROW_CACHE") or Path(base) / "hvd-batchgrow")


def file_stamp(*paths: Path) -> list[Any]:
    """Name, size and time of files: what a cache made of them depends on. Raises RunError if one is missing."""
    try:
        return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error.strerror}") from None


def cached_arrays(kind: str, identity: str, stamp: Any, build: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
    """Arrays of the cache, made first where they are missing or where what they were made of has changed.

    Of several processes one builds and the others wait. Nobody sees half a cache: it is written in a
    folder of its own and moved into place.

    Args:
        kind: what made them, part of the folder's name.
        identity: what they belong to, such as the path of a tree; one cache is kept for each.
        stamp: plain data that changes when what they were made of does.
        build: makes them.

    Returns:
        memory-mapped read-only arrays: the ranks of a host share their pages.

    Raises:
        RunError: the cache cannot be written.
    """
    folder = cache_folder() / "data" / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    wanted = json.dumps([_FORMAT, kind, identity, stamp], sort_keys=True)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not _is_stamped(folder, wanted):
                _write(folder, wanted, _built(build))
            # As plain arrays over the mapping: what is taken out of a np.memmap would be one again.
            return {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}
    except OSError as error:
        raise RunError(f"cache {folder.parent}: {error.strerror or error}; another: HVD_BATCHGROW_CACHE=…") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file: one process of a host at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_stamped(folder: Path, wanted: str) -> bool:
    try:
        return (folder / "stamp.json").read_text(encoding="utf-8") == wanted
    except OSError:
        return False


def _built(build: Callable[[], Arrays]) -> Arrays:
    try:
        return build()
    except OSError as error:  # of the files that are read: not the cache's fault
        raise RunError(f"{error.filename or 'data'} cannot be read: {error.strerror or error}") from None


def _write(folder: Path, stamp: str, arrays: Arrays) -> None:
    for left in folder.parent.glob(f"build-{folder.name}-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"build-{folder.name}-"))
    try:
        for name, array in arrays.items():
            np.save(work / f"{name}.npy", array)
        (work / "stamp.json").write_text(stamp, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
