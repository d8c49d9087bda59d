"""Stop requests: set by signals, checked between updates."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Protocol

from hvd_batchgrow.interrupt import end_now, say
from hvd_batchgrow.messages.errors import ExitCode

_POLL_S = 0.05
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Stop(Protocol):
    """Source of stop requests for this rank."""

    @property
    def stop_requested(self) -> bool:
        """Whether a stop has been requested."""


class StopRequest:
    """While entered, SIGTERM, SIGUSR2 and a first SIGINT request a stop; SIGINT after one of them ends the process.

    That works even while the process waits for other ranks in a call that lets no signal handler run, because a
    thread receives the signals. If the process ignores SIGINT, for instance because of `nohup … &`, it still does.
    SIGUSR1 is not handled, because NCCL may use it.

    Args:
        connecting: while it is True, SIGTERM ends the process at once. Set it to False when the ranks are connected. A
            rank that torchrun restarts would otherwise wait for ranks that have ended, until torchrun kills it.
    """

    def __init__(self, *, connecting: bool = False) -> None:
        self.stop_requested, self.connecting = False, connecting
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = threading.Thread(target=self._listen, args=(read_end,), name="interrupts", daemon=True)
        self._thread.start()
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        kept = [number for number in _SIGNALS if (number, signal.getsignal(number)) != (signal.SIGINT, signal.SIG_IGN)]
        self._before = {number: signal.signal(number, self._request) for number in kept}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)
        self._thread.join()

    def wait(self, timeout_s: float) -> None:
        """Wait for a stop request, at most for some seconds."""
        deadline = time.monotonic() + timeout_s
        while not self.stop_requested and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True

    def _listen(self, read_end: int) -> None:
        """Read the number of each signal as a byte, until the write end is closed."""
        requested = False
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM and self.connecting:
                os._exit(ExitCode.STOPPED)
            if number[0] == signal.SIGINT and requested:
                end_now("interrupted again: ended at once, without another checkpoint")
            if number[0] == signal.SIGINT:
                say("interrupted: stops at the next update, with a checkpoint; a second ctrl-C ends it at once")
            requested = requested or number[0] in _SIGNALS
        os.close(read_end)
