"""Run a process with a limit of time, and show its last line. Only Python's standard library is imported here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

POLL_S, SHOW_S = 0.1, 1.0


def run_limited(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, limit_s: float, label: str
) -> int | None:
    """Run a command, and return its exit code, or None if it took longer than its limit and was killed.

    Args:
        command: the program and its arguments.
        folder: where it runs.
        environment: of the process.
        log: file for its output.
        limit_s: after which the process and all that it has started are killed.
        label: shown on stderr with the last line of the output: updated each second on a terminal, otherwise once.
    """
    begin = time.monotonic()
    with log.open("wb") as output:
        # A separate session: what the process starts, such as ranks, can be killed with it.
        process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        with Progress(label, log) as progress:
            while process.poll() is None:
                if time.monotonic() - begin > limit_s:
                    return None
                progress.show(time.monotonic() - begin)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        return process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Progress:
    """A line on stderr that is updated on a terminal, and otherwise written once."""

    def __init__(self, label: str, log: Path) -> None:
        self._label, self._log, self._next_s = label, log, 0.0

    def __enter__(self) -> Progress:
        if not sys.stderr.isatty():
            print(f"{self._label} …", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def show(self, seconds: float) -> None:
        """Update the line, at most once a second."""
        if seconds < self._next_s or not sys.stderr.isatty():
            return
        self._next_s = seconds + SHOW_S
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - 400))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        text = f"{self._label}, {seconds:.0f} s: {lines[-1] if lines else 'starting'}"
        sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
        sys.stderr.flush()
