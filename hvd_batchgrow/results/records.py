"""Values of records, which may have any type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NOT_METRICS = frozenset({"kind", "samples", "epoch", "updates", "loss", "dataset"})
"""Keys of an evaluation in metrics.jsonl that are not metrics of the task."""


def number(value: Any) -> float | None:
    """Return a finite number of a record; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def whole(value: Any, least: int, default: int) -> int:
    """Return a value of a record if it is a whole number of at least `least`, and otherwise a default."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value if is_whole and least <= value < 2**62 else default


def is_usable(evaluation: Mapping[str, Any]) -> bool:
    """Return whether each loss of an evaluation is a finite number; if not, its metrics are meaningless too."""
    return all(number(evaluation[name]) is not None for name in ("loss", "average_loss") if name in evaluation)


def printable(text: str) -> str:
    """Return at most 500 characters of a text, with control characters, which could change a terminal, as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:500])


def base_name(name: str) -> str:
    """Return the name of a run without its seed: `job-twin` for `job-seed3-twin`."""
    return re.sub(r"-seed\d+(?=(-twin)?$)", "", name)


def task_name(job: Mapping[str, Any]) -> str:
    """Return `task.name` of a job as plain values."""
    section = job.get("task")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) else "classification"
