"""The git checkouts that a run's code comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str | None:
    """Return git's output for a folder; None if it is not in a checkout, or git fails."""
    command = ("git", "-C", str(folder), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
        return done.stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def program_checkout(file: Path) -> tuple[str | None, str | None]:
    """Return commit and changes of the checkout that tracks a file of this program.

    An installed package is tracked by none, also where a checkout of the user contains the environment that it is
    installed in: the commit would be that of the user's code.

    Args:
        file: a Python file of this package.
    """
    if git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    return git(file.parent, "rev-parse", "HEAD"), git(file.parent, "diff", "HEAD")
