"""A moving average over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence


class MovingAverage:
    """Moving average with a memory in samples, divided by the sum of its weights (bias correction)."""

    def __init__(self, memory_samples: float) -> None:
        self._memory_samples, self._sum, self._weight = memory_samples, 0.0, 0.0

    def add(self, value: float, samples: int) -> None:
        """Add the value of an update of `samples` samples."""
        kept = math.exp(-samples / self._memory_samples)
        self._sum, self._weight = kept * self._sum + (1 - kept) * value, kept * self._weight + 1 - kept

    @property
    def value(self) -> float | None:
        """The average; None: no value was added."""
        return self._sum / self._weight if self._weight else None

    def state(self) -> list[float]:
        """Return plain values for a checkpoint."""
        return [self._sum, self._weight]

    def load(self, state: Sequence[float]) -> None:
        """Restore the result of `state`."""
        self._sum, self._weight = state
