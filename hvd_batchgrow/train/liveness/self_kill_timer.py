"""A process that does not say that it lives is killed by the kernel, even where it is stopped."""

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


class DeadManSwitch:
    """A timer of the kernel's that sends this process SIGKILL, unless it is set again before.

    A process that is stopped (SIGSTOP), or whose threads all wait for Python's lock, cannot end itself,
    and on a host of its own nobody else can. Without POSIX timers it does nothing.
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
        """From now on, the process has so long to live; with 0, as long as it likes."""
        if self._works:
            rest, whole = math.modf(after_s)
            when = _Time(0, 0, int(whole), int(rest * 1e9))
            self._libc.timer_settime(self._timer, 0, ctypes.byref(when), None)

    def close(self) -> None:
        """It is needed no more."""
        if self._works:
            self._works = False
            self._libc.timer_delete(self._timer)
