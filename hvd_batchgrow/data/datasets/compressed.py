"""Recognize compressed files by their first bytes."""

from __future__ import annotations

from pathlib import Path

_TOOLS = {
    **{b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"},
    **{b"\x28\xb5\x2f\xfd": "unzstd", b"PK\x03\x04": "unzip"},
}
"""First bytes of compressed files, and the command that unpacks them."""


def unpacking(path: Path) -> str | None:
    """Return the command that unpacks a file; None if it does not seem to be compressed.

    Call it only for files that could not be read: a valid file may start with the same bytes.
    """
    with path.open("rb") as file:
        start = file.read(max(map(len, _TOOLS)))
    return next((f"{tool} {path}" for magic, tool in _TOOLS.items() if start.startswith(magic)), None)
