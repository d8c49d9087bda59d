"""Folders of .npy files for the source `numpy`, each with about.json: what the folder holds, and how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError, unwritable
from hvd_batchgrow.storage.atomic import UnbufferedFile, new_folder
from hvd_batchgrow.storage.strict_json import dump_json

ABOUT = "about.json"

Arrays = Mapping[str, NDArray[Any]]


def is_complete(folder: Path, made_of: Mapping[str, Any]) -> bool:
    """Return whether a folder has all of its files unchanged; False if it is absent or empty.

    Args:
        folder: a folder that `write_arrays` has written, or will write.
        made_of: the options that it must have been made with.

    Raises:
        RunError: the folder holds something else, was made with other options, or has a changed file.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    advice = f"remove {folder}, or choose another folder with --out"
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found, files = dict(about["made_of"]), about["arrays"]
        wrong = [name for name in files if sha256_of(folder / name) != files[name]["sha256"]]
    except (OSError, ValueError, LookupError, TypeError):
        raise RunError(f"{folder} exists, and is neither empty nor a complete set; {advice}") from None
    if wrong:
        raise RunError(f"{folder / wrong[0]} has changed since it was written; {advice}")
    plain = json.loads(dump_json(made_of))
    if other := sorted(key for key in plain.keys() | found.keys() if plain.get(key) != found.get(key)):
        raise RunError(f"{folder} was made with other values of {', '.join(other)}; {advice}")
    return True


def write_arrays(
    folder: Path,
    made_of: Mapping[str, Any],
    about: Mapping[str, Any],
    arrays: Arrays,
    write_more: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write an .npy file for each array, and about.json, into a new folder. A folder that exists is complete.

    Args:
        folder: must be absent or empty; its parents are created.
        made_of: the options that the arrays are made with.
        about: further entries of about.json.
        arrays: by name, such as `train_images`.
        write_more: called with the unfinished folder, to write further files.

    Raises:
        RunError: the folder cannot be written; no part of it remains.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as work:
            files = {}
            for name, array in arrays.items():
                path = work / f"{name}.npy"
                with path.open("wb", buffering=0) as file:
                    np.save(UnbufferedFile(file), array)  # NumPy's own writing does not report that a disk is full
                files[path.name] = {"shape": array.shape, "dtype": str(array.dtype), "sha256": sha256_of(path)}
            write_more(work)
            text = dump_json({"made_of": made_of, "arrays": files, **about}, indent=1)
            (work / ABOUT).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> str:
    """Return a line for each array of a folder: name, shape, bytes and SHA-256."""
    files = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["arrays"]
    lines = [str(folder)]
    for name, file in files.items():
        size = (folder / name).stat().st_size
        shape = " x ".join(f"{count:,}" for count in file["shape"])
        lines.append(f"  {name:18} {file['dtype']:6} {shape:22} {size:13,} bytes, SHA-256 {file['sha256'][:16]}…")
    return "\n".join(lines)
