"""A request to stop, taken from signals and looked at between updates."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Protocol

from hvd_batchgrow.interrupt import end_now, say

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Stop(Protocol):
    """Says whether this rank is asked to stop."""

    @property
    def stop_requested(self) -> bool:
        """True from the request on."""


class StopAfter:
    """Asks to stop with the last of some updates, or when another stop does.

    Args:
        other: a stop that is looked at too.
        done: how many updates have been done.
        updates: of how many.
    """

    def __init__(self, other: Stop, done: Callable[[], int], updates: int) -> None:
        self._other, self._done, self._updates = other, done, updates

    @property
    def stop_requested(self) -> bool:
        """True once one is left to do: the vote of an update stops the run after it."""
        return self._done() >= self._updates - 1 or self._other.stop_requested


class StopRequest:
    """While entered, SIGTERM, SIGUSR2 and a first SIGINT only ask; SIGINT after any of them ends this process at once.

    At once is while it waits for other ranks, too, in a call that lets no handler run: a thread hears the
    signals. USR1 is left alone: NCCL may use it.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._thread = threading.Thread(target=_listen, args=(heard,), name="interrupts", daemon=True)
        self._thread.start()
        self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._told)
        self._thread.join()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True


def _listen(heard: int) -> None:
    """Until nobody can write any more: each signal is a byte, its number."""
    asked = False
    while number := os.read(heard, 1):
        if number[0] == signal.SIGINT and asked:
            end_now("interrupted again: ended at once, without another checkpoint")
        if number[0] == signal.SIGINT:
            say("interrupted: stops at the next update, with a checkpoint; once more ends it at once")
        asked = asked or number[0] in _SIGNALS
    os.close(heard)
