"""Values of records, which may hold anything."""

from __future__ import annotations

from typing import Any


def number(value: Any) -> float | None:
    """Return a finite number of a record; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None
