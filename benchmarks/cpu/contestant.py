"""A training process that works only in its own turns, so that contestants share a machine but no process.

Between its turns it is suspended, with all processes that it has started: a rank that waits for another may use a core.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
DONE = "turn is done"
"""What the process prints when it waits for its next turn; it begins when it reads a line."""


def serve(work: Callable[[], object]) -> None:
    """Work in turns, in the process of a contestant, until the parent closes the connection."""
    while wait_for_turn():
        work()


def wait_for_turn() -> bool:
    """Report that the last turn is done, and wait for the next one; return whether there is one."""
    print(DONE, flush=True)
    return bool(sys.stdin.readline())


class Contestant:
    """The parent's side of a contestant.

    Args:
        command: starts the process, or the launcher of its ranks.
        environment: variables besides those of this process.
        folder: where it runs.
        samples: number of samples of a turn.

    Raises:
        RuntimeError: the process ends before its first turn, or in a turn; the message has its last output.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path, samples: int) -> None:
        self._command, self._samples, self._log = command, samples, folder / "stderr.txt"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), **environment},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._wait()

    def turn(self) -> int:
        """Let it work for one turn; return the number of samples."""
        self._signal_all(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._wait()
        return self._samples

    def peak_memory(self) -> list[int]:
        """Return the peak resident memory of each Python process, in bytes, largest first."""
        found = []
        for pid in _tree(self._process.pid):
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if "python" in status.splitlines()[0]:
                    found += [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
        return sorted(found, reverse=True)

    def close(self) -> None:
        """End all its processes."""
        processes = _tree(self._process.pid)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()  # ends `train`, which waits for its turn and would take SIGTERM as a request
        self._process.terminate()
        self._signal_all(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._close_pipes()

    def _wait(self) -> None:
        """Wait until the turn is done, and suspend all processes."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()).strip() != DONE:
            if not line:
                code = self._process.wait()
                self._close_pipes()
                lines = self._log.read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"{shlex.join(self._command)} has ended with code {code}: {' / '.join(lines[-3:])}")
        self._signal_all(signal.SIGSTOP)

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(OSError):  # an unread line of a process that has ended
                    pipe.close()

    def _signal_all(self, number: int) -> None:
        for pid in _tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _tree(pid: int) -> list[int]:
    """Return the ids of a process and of all that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in task.read_text().split():
                found += _tree(int(child))
    return found


@contextmanager
def closing_all() -> Iterator[dict[str, Contestant]]:
    """Yield a mapping for contestants, and end them when the block ends."""
    started: dict[str, Contestant] = {}
    try:
        yield started
    finally:
        for contestant in started.values():
            contestant.close()
