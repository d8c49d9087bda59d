"""A cache of arrays that are costly to build, kept between runs and shared by the ranks of a host."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError, reason_of, unreadable
from hvd_batchgrow.storage.atomic import new_folder
from hvd_batchgrow.storage.file_lock import locked
from hvd_batchgrow.storage.strict_json import dump_json

_ANOTHER = "another: HVD_BATCHGROW_CACHE=…"
Arrays = Mapping[str, NDArray[Any]]
_FORMAT = 7
"""Incremented whenever the contents of a cache change their meaning."""


def cache_folder() -> Path:
    """Return this project's cache folder of the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HVD_BATCHGROW_CACHE") or Path(base) / "hvd-batchgrow")


def file_stamp(*paths: Path) -> list[Any]:
    """Return name, size and modification time of files, which decide whether a cache made of them is still valid.

    Raises:
        RunError: a file is missing, or is not a regular file: reading a pipe or a device might never end.
    """
    try:
        states = [path.stat() for path in paths]
        names = [str(path.resolve()) for path in paths]
    except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
        raise unreadable(getattr(error, "filename", paths[0]), error) from None
    for path, state in zip(paths, states, strict=True):
        if not stat.S_ISREG(state.st_mode):
            raise RunError(f"{path} is {'a folder' if stat.S_ISDIR(state.st_mode) else 'a pipe or device'}, not a file")
    return [[name, state.st_size, state.st_mtime_ns] for name, state in zip(names, states, strict=True)]


def cached_arrays(kind: str, identity: str, stamp: Any, build: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a cache; build them first if they are missing or their inputs have changed.

    One process builds while the others wait. No process sees half a cache.

    Args:
        kind: name of the builder, part of the folder's name.
        identity: what the arrays belong to, such as the path of a tree; each identity has one cache.
        stamp: plain data that changes whenever the inputs do.
        build: returns the arrays.

    Returns:
        memory-mapped read-only arrays: the ranks of a host share their pages.

    Raises:
        RunError: the cache cannot be written.
    """
    folder = _own_folder() / f"{kind}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}"
    made_of = [_FORMAT, kind, identity, stamp]
    try:
        with locked(folder.with_suffix(".lock")):
            found = _mapped(folder, made_of)
            if found is None:
                _write(folder, made_of, _built(build))
                found = _mapped(folder, made_of)
    except OSError as error:
        raise RunError(f"cache {folder.parent}: {reason_of(error)}; {_ANOTHER}") from None
    if found is None:
        raise RunError(f"cache {folder} does not hold what was just written there; {_ANOTHER}")
    return found


def _own_folder() -> Path:
    """Return the folder of all caches. Raise RunError if another user can write to it."""
    folder = cache_folder() / "data"
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: a path of a thousand folders
        raise RunError(f"cache {folder}: {reason_of(error)}; {_ANOTHER}") from None
    if status.st_uid != os.geteuid():
        raise RunError(f"cache {folder} belongs to user {status.st_uid}, who could put anything there; {_ANOTHER}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
        raise RunError(
            f"cache {folder} {fault}; remove it, or, if you trust what it holds: chmod 700 {shlex.quote(str(folder))}"
        )
    return folder


def _mapped(folder: Path, made_of: Any) -> dict[str, NDArray[Any]] | None:
    """Return the arrays of a cache; None if it is missing, damaged, or made of other inputs."""
    try:
        if folder.is_symlink() or any(path.is_symlink() for path in folder.iterdir()):
            return None
        # Plain arrays over the mapping: slices of a np.memmap would be np.memmap again.
        arrays = {
            path.stem: np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in folder.glob("*.npy")
        }
        is_theirs = (folder / "stamp.json").read_text(encoding="utf-8") == _stamp(made_of, arrays)
    except Exception:  # a truncated file, a pickle, a damaged header: whatever is wrong, the cache is rebuilt
        return None
    return arrays if is_theirs else None


def _stamp(made_of: Any, arrays: Arrays) -> str:
    forms = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    return dump_json({"made_of": made_of, "arrays": forms}, sort_keys=True)


def _built(build: Callable[[], Arrays]) -> Arrays:
    try:
        return build()
    except OSError as error:  # from reading the inputs, not the cache
        raise unreadable(error.filename or "data", error) from None


def _write(folder: Path, made_of: Any, arrays: Arrays) -> None:
    with new_folder(folder) as work:
        work.chmod(0o700)
        for name, array in arrays.items():
            np.save(work / f"{name}.npy", array)
        (work / "stamp.json").write_text(_stamp(made_of, arrays), encoding="utf-8")
        if folder.is_symlink():  # its target is not ours to remove
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
