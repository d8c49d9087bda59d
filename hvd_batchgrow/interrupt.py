"""Ctrl-C: one line, and the end, at whatever stage."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from hvd_batchgrow.comm.launcher_env import is_first_process
from hvd_batchgrow.messages.errors import ExitCode

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h\n"
"""A progress bar has hidden it."""


def end_on_interrupt() -> None:
    """From now on SIGINT ends this process, unless it was started to leave it alone, as by `nohup … &`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: end_now("interrupted"))


@contextmanager
def tidied_up_on_interrupt() -> Iterator[None]:
    """While entered, SIGINT raises KeyboardInterrupt, so that what was begun is undone; then it ends this process.

    So do SIGTERM, and SIGHUP, which comes when the terminal is gone.
    """
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number in [number for number, handler in before.items() if handler is not signal.SIG_IGN]:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        end_now("interrupted")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While entered, what would raise KeyboardInterrupt waits: so a process that is being started is known by then."""
    came: list[int] = []
    raising = [number for number in _ENDING if signal.getsignal(number) is signal.default_int_handler]
    for number in raising:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number in raising:
            signal.signal(number, signal.default_int_handler)
        if came:
            signal.raise_signal(came[0])


def end_now(why: str) -> NoReturn:
    """Say why, and end this process with 130: nothing is awaited, and no `finally` is run."""
    say(why)
    os._exit(ExitCode.INTERRUPTED)


def say(text: str) -> None:
    """One line from all ranks together; from any thread, and in the midst of whatever is being printed."""
    if is_first_process(os.environ):
        os.write(2, f"{_SHOW_CURSOR if os.isatty(2) else ''}hvd-batchgrow: {text}\n".encode())
