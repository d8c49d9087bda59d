"""A name like one that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def near_path(path: Path, names: Iterable[str] | None = None) -> str:
    """`; did you mean runs/first?`, or nothing: what lies beside a path that is not there and is called alike.

    Args:
        path: the one that is not there.
        names: of what may be meant; None: all that its folder holds.
    """
    try:
        beside = [other.name for other in path.parent.iterdir()] if names is None else list(names)
    except (OSError, ValueError):  # ValueError: a name with NUL
        return ""
    others = [name for name in beside if name != path.name]  # it may be there, and be something else
    found = get_close_matches(path.name, others, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / found[0]}?" if found else ""
