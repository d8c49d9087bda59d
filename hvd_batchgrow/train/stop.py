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
