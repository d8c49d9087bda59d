"""What a row has measured. Only Python's standard library is imported here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One contestant: a value for each turn."""

    name: str
    values: list[float]
    ratios: list[float] | None = None
    """To the group's reference in the same turn; None: the reference itself, or no reference."""


@dataclass(frozen=True)
class Group:
    """Contestants that took turns."""

    title: str
    unit: str
    figures: list[Figure]
    reference: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of a row."""

    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Facts about the run, such as sizes."""
    failed: str = ""
    """What is wrong; empty: nothing."""
    skipped: str = ""
    """Why the row did not run; empty: it ran."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with median and range of each figure."""
        tree = asdict(self)
        for group in tree["groups"]:
            for figure in group["figures"]:
                figure["summary"] = summary(figure["values"])
                figure["ratio"] = summary(figure["ratios"]) if figure["ratios"] else None
        return tree

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Outcome:
        """Return the outcome that `to_json` has written."""
        groups = [
            Group(
                group["title"],
                group["unit"],
                [Figure(figure["name"], figure["values"], figure["ratios"]) for figure in group["figures"]],
                group["reference"],
            )
            for group in tree["groups"]
        ]
        return cls(groups, tree["notes"], tree["failed"], tree["skipped"])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return number of turns, median, least and most."""
    return {"n": len(values), "median": statistics.median(values), "least": min(values), "most": max(values)}


def compare(title: str, unit: str, rates: Mapping[str, Sequence[float]], reference: str, scale: float = 1.0) -> Group:
    """Return a group from the rates of `take_turns`, with the ratio of each contestant to the reference in each turn.

    Args:
        title: what was measured.
        unit: of the figures.
        rates: of each contestant in each turn.
        reference: the contestant to compare with.
        scale: from rates to the unit.
    """
    figures = [
        Figure(
            name,
            [scale * value for value in values],
            None if name == reference else ratios_of(values, rates[reference]),
        )
        for name, values in rates.items()
    ]
    return Group(title, unit, figures, reference)


def ratios_of(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratio in each turn."""
    return [a / b for a, b in zip(values, others, strict=True)]
