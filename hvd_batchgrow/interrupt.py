"""Ctrl-C: at any stage it prints one line and ends the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from hvd_batchgrow.comm.launcher_env import is_first_process
from hvd_batchgrow.messages.errors import ExitCode

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h\n"
"""Undoes what a progress bar does."""


def end_on_interrupt() -> None:
    """Make SIGINT end this process, unless the process ignores SIGINT, for instance because of `nohup … &`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: end_now("interrupted"))


@contextmanager
def tidied_up_on_interrupt() -> Iterator[None]:
    """While entered, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that `finally` blocks clean up.

    Then the process ends. SIGHUP comes when the terminal is closed.
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
    """While entered, delay signals that raise KeyboardInterrupt, so that a child is registered once it is started."""
    received: list[int] = []
    raising = [number for number in _ENDING if signal.getsignal(number) is signal.default_int_handler]
    for number in raising:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number in raising:
            signal.signal(number, signal.default_int_handler)
        if received:
            signal.raise_signal(received[0])


def end_now(why: str) -> NoReturn:
    """Print why, and end this process with 130 at once: no `finally` block runs."""
    say(why)
    os._exit(ExitCode.INTERRUPTED)


def say(text: str) -> None:
    """Print one line for all ranks together; safe in any thread and while other output is being printed."""
    if is_first_process(os.environ):
        with suppress(OSError):  # a closed pipe must not keep the process alive
            os.write(2, f"{_SHOW_CURSOR if os.isatty(2) else ''}hvd-batchgrow: {text}\n".encode())
