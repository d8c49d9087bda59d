"""Values of records, which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_batchgrow.messages.wording import shown


def number(value: Any) -> float | None:
    """Return a finite number of a record; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def printable(text: str) -> str:
    """Return a text of a record for a terminal: quoted and escaped if it contains control characters."""
    return text if text.isprintable() else shown(text)


def task_name(job: Mapping[str, Any]) -> str:
    """Return `task.name` of a job as plain values."""
    section = job.get("task")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) else "classification"
