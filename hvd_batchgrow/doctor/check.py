"""The verdict of one check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "note", "fail"]
"""fail: training does not work, or does not use the installed hardware or packages. note: an optional part is missing
or limited, and training works without it."""

Facts = Mapping[str, Any]
"""Facts about one part, as plain values. With the key `error`, no other fact is known, and the value is the reason."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    found: str
    """Versions, numbers and paths."""
    remedy: str = ""
    """A command or setting that fixes or improves it; empty: nothing to do."""

    def to_dict(self) -> dict[str, str]:
        """Return the check as plain values."""
        return asdict(self)


def ok(name: str, found: str) -> Check:
    """Return a check that found nothing to improve."""
    return Check(name, "ok", found)


def note(name: str, found: str, remedy: str = "") -> Check:
    """Return a check that found something optional missing or limited."""
    return Check(name, "note", found, remedy)


def fail(name: str, found: str, remedy: str = "") -> Check:
    """Return a check that failed."""
    return Check(name, "fail", found, remedy)
