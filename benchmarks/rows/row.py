"""The rows of a benchmark and their settings. Only Python's standard library is imported here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LEAST_TURNS, MOST_TURNS = 3, 41
"""Least and largest number of turns for a median; a slow row may exceed its budget to do the least."""

Device = Literal["cuda", "cpu"]


class Skip(Exception):  # noqa: N818  # not an error
    """A row cannot run here; the message says why."""


@dataclass(frozen=True)
class Row:
    """A row of the check."""

    title: str
    budget_s: float
    """Default time budget, including the start of the row's process."""
    needs: tuple[str, ...]
    """Distributions without which the row is skipped."""
    module: str
    """Module whose `run` is called with the row's name and `Settings`, and returns an `Outcome`."""


@dataclass(frozen=True)
class Settings:
    """The settings of a row."""

    device: Device
    until: float
    """Value of `time.monotonic()`, which all processes of a machine share, at which the budget is spent."""
    is_tiny: bool
    """Whether networks and sizes are tiny: the row only shows that it works."""

    @property
    def wrn(self) -> str:
        """The name of the wide ResNet."""
        return "wrn_10_1" if self.is_tiny else "wrn_16_4"

    @property
    def turns(self) -> int:
        """The most turns, if the budget is large enough."""
        return LEAST_TURNS if self.is_tiny else MOST_TURNS

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self.until - time.monotonic()

    def is_over(self, end: float | None = None) -> Callable[[], bool]:
        """Return a function that says whether the budget is spent, or an earlier `end` of the clock has passed."""
        return lambda: time.monotonic() >= (self.until if end is None else end)

    def part(self, number: int, count: int) -> Callable[[], bool]:
        """Return `is_over` of part `number` of `count` that share the rest of the budget evenly; call it in order."""
        return self.is_over(time.monotonic() + max(0.0, self.left_s) / (count - number))


def say(text: str) -> None:
    """Report progress: the check shows the last line of a row's output."""
    print(text, flush=True)
