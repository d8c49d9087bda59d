"""A kernel timer that kills this process if it hangs, even if the process is stopped."""

from __future__ import annotations

import ctypes
import math
import signal


class _Event(ctypes.Structure):
    """`struct sigevent`."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _Time(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("after_s", ctypes.c_long),
        ("after_ns", ctypes.c_long),
    )


_CLOCK_MONOTONIC, _BY_SIGNAL = 1, 0


class SelfKillTimer:
    """A kernel timer that sends SIGKILL to this process unless it is set again in time.

    A process that is stopped (SIGSTOP), or whose threads all wait for Python's lock, cannot end itself, and a rank
    alone on its host cannot be ended by another. Without POSIX timers this class does nothing.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._timer = ctypes.c_void_p()
        event = _Event(None, signal.SIGKILL, _BY_SIGNAL, b"")
        try:
            failed = self._libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer))
        except AttributeError:
            failed = True
        self._works = not failed

    def set(self, after_s: float) -> None:
        """Kill the process in `after_s` seconds unless the timer is set again; 0 disarms it."""
        if self._works:
            rest, whole = math.modf(after_s)
            when = _Time(0, 0, int(whole), int(rest * 1e9))
            self._libc.timer_settime(self._timer, 0, ctypes.byref(when), None)

    def close(self) -> None:
        """Delete the timer."""
        if self._works:
            self._works = False
            self._libc.timer_delete(self._timer)
