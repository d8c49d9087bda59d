"""A request to stop, taken from signals and looked at between updates."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Protocol

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Stop(Protocol):
    """Says whether this rank is asked to stop."""

    @property
    def asked(self) -> bool:
        """True from the request on."""


class StopAfter:
    """Asks to stop after some updates, or when another stop does.

    Args:
        other: a stop that is looked at too.
        updates: how many looks, one before each update, until this one asks.
    """

    def __init__(self, other: Stop, updates: int) -> None:
        self._other, self._left = other, updates

    @property
    def asked(self) -> bool:
        """True from the last of the updates on: the vote of an update stops the run after it."""
        self._left -= 1
        return self._left <= 0 or self._other.asked


class StopRequest:
    """While entered, SIGTERM, SIGUSR2 and a first SIGINT only ask; a second SIGINT stops at once.

    USR1 is left alone: NCCL may use it.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
