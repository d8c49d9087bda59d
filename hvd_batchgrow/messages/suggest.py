"""Suggest a file for a path that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def near_path(path: Path, names: Iterable[str] | None = None) -> str:
    """Return `; did you mean runs/first?` for a similar name in the same folder, or nothing.

    Args:
        path: the path that does not exist.
        names: the candidates; None: everything in its folder.
    """
    try:
        beside = [other.name for other in path.parent.iterdir()] if names is None else list(names)
    except (OSError, ValueError):  # ValueError: a name with NUL
        return ""
    others = [name for name in beside if name != path.name]  # the path may exist and be something else
    found = get_close_matches(path.name, others, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


def near_folder(path: Path) -> str:
    """Like `near_path`, for a folder: only folders are suggested."""
    try:
        return near_path(path, [other.name for other in path.parent.iterdir() if other.is_dir()])
    except (OSError, ValueError):
        return ""
