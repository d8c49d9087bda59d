"""Arrays that are costly to make, kept between runs and shared by the ranks of a host."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.strict_json import dump_json

_ANOTHER = "another: HVD_BATCHGROW_CACHE=…"
Arrays = Mapping[str, NDArray[Any]]
_FORMAT = 5
"""Counted up when what a cache holds changes its meaning."""


def cache_folder() -> Path:
    """The user's cache of this project."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HVD_BATCHGROW_CACHE") or Path(base) / "hvd-batchgrow")


def file_stamp(*paths: Path) -> list[Any]:
    """Name, size and time of files: what a cache made of them depends on.

    Raises:
        RunError: one is missing, or is something else: reading a pipe or a device might never end.
    """
    try:
        states = [path.stat() for path in paths]
        names = [str(path.resolve()) for path in paths]
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round in circles
        place, told = getattr(error, "filename", paths[0]), getattr(error, "strerror", None) or error
        raise RunError(f"{place} cannot be read: {told}") from None
    for path, state in zip(paths, states, strict=True):
        if not stat.S_ISREG(state.st_mode):
            raise RunError(f"{path} is no file: {'a folder' if stat.S_ISDIR(state.st_mode) else 'a pipe or device'}")
    return [[name, state.st_size, state.st_mtime_ns] for name, state in zip(names, states, strict=True)]


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
    folder = _own_folder() / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    made_of = [_FORMAT, kind, identity, stamp]
    try:
        with locked(folder.with_suffix(".lock")):
            found = _mapped(folder, made_of)
            if found is None:
                _write(folder, made_of, _built(build))
                found = _mapped(folder, made_of)
    except OSError as error:
        raise RunError(f"cache {folder.parent}: {error.strerror or error}; {_ANOTHER}") from None
    if found is None:
        raise RunError(f"cache {folder} does not hold what was just written there; {_ANOTHER}")
    return found


def _own_folder() -> Path:
    """Where caches lie: a folder that nobody but this user can write. Raises RunError if it is not that."""
    folder = cache_folder() / "data"
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: a path of a thousand folders
        raise RunError(f"cache {folder}: {getattr(error, 'strerror', None) or error}; {_ANOTHER}") from None
    if status.st_uid != os.geteuid():
        raise RunError(f"cache {folder} belongs to user {status.st_uid}, who could put anything there; {_ANOTHER}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
        raise RunError(
            f"cache {folder} {fault}; remove it, or, if you trust what it holds: chmod 700 {shlex.quote(str(folder))}"
        )
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file: one process of a host at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mapped(folder: Path, made_of: Any) -> dict[str, NDArray[Any]] | None:
    """The arrays of a cache; None: there are none, or not those that were written, of what is there now."""
    try:
        if folder.is_symlink() or any(path.is_symlink() for path in folder.iterdir()):
            return None
        # As plain arrays over the mapping: what is taken out of a np.memmap would be one again.
        arrays = {
            path.stem: np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in folder.glob("*.npy")
        }
        is_theirs = (folder / "stamp.json").read_text(encoding="utf-8") == _stamp(made_of, arrays)
    except Exception:  # cut short, a pickle, a header that is none: it can be damaged in any way, and is made anew
        return None
    return arrays if is_theirs else None


def _stamp(made_of: Any, arrays: Arrays) -> str:
    forms = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    return dump_json({"made_of": made_of, "arrays": forms}, sort_keys=True)


def _built(build: Callable[[], Arrays]) -> Arrays:
    try:
        return build()
    except OSError as error:  # of the files that are read: not the cache's fault
        raise RunError(f"{error.filename or 'data'} cannot be read: {error.strerror or error}") from None


def _write(folder: Path, made_of: Any, arrays: Arrays) -> None:
    for left in folder.parent.glob(f"build-{folder.name}-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"build-{folder.name}-"))
    try:
        for name, array in arrays.items():
            np.save(work / f"{name}.npy", array)
        (work / "stamp.json").write_text(_stamp(made_of, arrays), encoding="utf-8")
        if folder.is_symlink():  # what it points at is not ours to remove
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
