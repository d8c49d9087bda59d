"""Compare the figures of a benchmark with those of its last file from the same machine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.rows.figures import Figure, Outcome

TOLERATED = 0.05
"""A ratio that is worse by more than this fraction is reported."""
_SAME = ("host", "cpu", "cores", "gpu")
"""Facts that are equal if two machines are the same."""


def last_file(folder: Path, name: str, machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the newest full-size file of a benchmark from a machine; None: no such file.

    Args:
        folder: the folder of the files.
        name: start of their names.
        machine: facts about the machine.
    """
    for file in sorted(folder.glob(f"{name}-*.json"), reverse=True):
        try:
            tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if not tree["note"] and all(tree["machine"].get(key) == machine.get(key) for key in _SAME):
                return tree
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged, or not such a file
    return None


def regressions(name: str, outcome: Outcome, earlier: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each ratio of a row that is worse than in an earlier file by more than `TOLERATED`.

    A ratio is better if it is higher, where the unit is a rate (samples/s), and otherwise if it is lower.
    """
    row = earlier["rows"].get(name)
    if not row or outcome.failed or outcome.skipped:
        return
    before = {(group.title, figure.name): figure for group in Outcome.from_json(row).groups for figure in group.figures}
    for group in outcome.groups:
        for figure in group.figures:
            old, new = _ratio(before.get((group.title, figure.name))), _ratio(figure)
            if old is None or new is None:
                continue
            change = old / new if "/s" in group.unit else new / old
            if change > 1 + TOLERATED:
                yield (
                    f"worse than on {earlier['date']}: {group.title}, {figure.name}: "
                    f"× {new:.2f} of {group.reference} instead of × {old:.2f}"
                )


def _ratio(figure: Figure | None) -> float | None:
    return statistics.median(figure.ratios) if figure and figure.ratios else None
