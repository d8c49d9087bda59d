"""Suggest a file, a folder or a run for a path that does not exist."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path

_CUTOFF = 0.7
"""Least similarity of two names, as difflib measures it: at 0.5, `nosuch` is similar to `n_nchw`."""


def near_path(path: Path, names: Iterable[str] | None = None) -> str:
    """Return `; did you mean jobs/first.toml?` for a similar name in the same folder, or nothing.

    Args:
        path: the path that does not exist.
        names: the candidates; None: everything in its folder.
    """
    try:
        beside = [other.name for other in path.parent.iterdir()] if names is None else list(names)
    except (OSError, ValueError):  # ValueError: a name with NUL
        return ""
    return _question(_similar(path, (path.parent / name for name in beside), lambda _: True))


def near_folder(path: Path) -> str:
    """Like `near_path`, for a folder: only folders are suggested."""
    return _question(_similar(path, _beside(path), Path.is_dir))


def near_run(path: Path, *, or_runs: bool = False) -> str:
    """Return what to write instead of a path that does not hold a run, or nothing.

    This is a similar run in the same folder; for a name without a folder, also one in `runs`. For a folder of runs, it
    is the command that lists them.

    Args:
        path: the path.
        or_runs: suggest folders of runs too.
    """
    try:
        if _has_runs(path):
            return f"; it contains runs: {shlex.join(['hvd-batchgrow', 'list', str(path)])}"
    except (OSError, ValueError):
        return ""
    below = Path("runs", path)
    is_bare = len(path.parts) == 1
    if is_bare and _is_run(below):
        return _question(below)
    candidates = [*_beside(path), *(_beside(below) if is_bare else [])]
    return _question(_similar(path, candidates, lambda other: _is_run(other) or (or_runs and _has_runs(other))))


def _is_run(folder: Path) -> bool:
    return (folder / "plan.json").is_file()


def _has_runs(folder: Path) -> bool:
    return any(folder.glob("*/plan.json"))


def _beside(path: Path) -> list[Path]:
    try:
        return list(path.parent.iterdir())
    except (OSError, ValueError):
        return []


def _similar(path: Path, candidates: Iterable[Path], fits: Callable[[Path], bool]) -> Path | None:
    """Return the candidate with the most similar name that fits; another name, as the path may exist."""
    by_name = {other.name: other for other in candidates if other.name != path.name}
    names = get_close_matches(path.name, by_name, n=len(by_name) or 1, cutoff=_CUTOFF)
    try:
        return next((by_name[name] for name in names if fits(by_name[name])), None)
    except OSError:
        return None


def _question(found: Path | None) -> str:
    return f"; did you mean {found}?" if found else ""
