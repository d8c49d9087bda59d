"""A lock that keeps two jobs from writing the same run."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.messages.errors import ExitCode, RunError, reason_of, unwritable
from hvd_batchgrow.results.run_summary import lock_path
from hvd_batchgrow.storage.file_lock import locked
from hvd_batchgrow.storage.regular_files import read_regular

BEAT_S = 5.0
"""Interval at which the holder updates its mark."""
NUM_BEATS = 4
"""A holder on another machine counts as dead if its mark does not change for this number of intervals."""
_POLL_S = 0.5


_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
"""Errors of flock on a file system without locks."""


class _TakenError(RunError):
    """Another job holds the lock."""


class RunLock:
    """A lock on a run folder, held from `take` to the end of the `with` block, or of the process.

    The lock file is next to the folder, because the folder may be removed and created again. NFS shares the kernel's
    locks between hosts, but some file systems do not. So the holder also writes a mark into the lock file, and updates
    it regularly. A process that gets the lock but finds the mark of a process on another machine first watches the mark
    for changes. No clocks are compared. A holder that was suspended for so long that another process has taken the lock
    finds that process's mark, and ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = lock_path(folder)
        self._held = contextlib.ExitStack()
        self._descriptor: int | None = None
        self._left = threading.Event()
        self._beats: threading.Thread | None = None

    def take(self, report: ReportProgress = lambda *_: None, wait_s: float = 0.0) -> None:
        """Take the lock.

        Args:
            report: receives the progress of the wait for another holder.
            wait_s: seconds to wait for a holder to release it.

        Raises:
            RunError: another job holds it (its host and process are named), or it cannot be written.
        """
        begin = time.monotonic()
        while True:
            try:
                return self._take(report)
            except _TakenError as taken:
                self._held.close()
                if (waited_s := time.monotonic() - begin) >= wait_s:
                    raise
                report(f"{taken}; waiting for it to end", int(waited_s), int(wait_s), "s")
            time.sleep(_POLL_S)

    def _take(self, report: ReportProgress) -> None:
        """Take the lock. Raises _TakenError if another process holds it, and RunError if it cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._held.enter_context(locked(self._path, wait=False))
            self._watch(read_regular(self._path).decode(errors="replace"), report)
            self._mark(0)
        except BlockingIOError:
            raise self._taken(self._path.read_text()) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise RunError(
                    f"{self._path.parent} has no file locks ({reason_of(error)}), so two jobs could write to one run: "
                    "choose another folder (--runs-dir), or mount it with locks (NFS: without nolock; Lustre: flock)"
                ) from None
            raise unwritable(error.filename or self._path, error) from None
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beats.start()

    def _taken(self, mark: str) -> _TakenError:
        holder = mark.partition("\n")[0] or "it has not written its name yet"
        return _TakenError(f"{self.folder} is being written by another job: {holder}")

    def _watch(self, mark: str, report: ReportProgress) -> None:
        """Raise _TakenError if the mark of a holder on another machine changes; flock covers this machine."""
        if not mark or _boot_id() in mark:
            return
        what = f"waiting to see whether {mark.partition(chr(10))[0]} still runs"
        for beat in range(NUM_BEATS):
            report(what, beat, NUM_BEATS, "checks")
            time.sleep(BEAT_S)
            if (now := self._path.read_text()) != mark:
                raise self._taken(now or mark)
        report(what, NUM_BEATS, NUM_BEATS, "checks")

    def _mark(self, beat: int) -> None:
        assert self._descriptor is not None
        mark = f"{_own_name()} beat {beat}\n".encode()
        # Overwrite before truncating, so that a concurrent reader always finds a name.
        os.pwrite(self._descriptor, mark, 0)
        os.ftruncate(self._descriptor, len(mark))
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self._left.wait(BEAT_S):
            beat += 1
            # The run itself reports errors such as a full disk.
            with contextlib.suppress(OSError):
                self._end_if_taken()
                self._mark(beat)

    def _end_if_taken(self) -> None:
        """End this process at once if another one has taken the lock: both would write the same files."""
        if not self._is_held():
            holder = self._path.read_text(errors="replace").partition("\n")[0] or "a job that has ended since"
            fault = f"this process was suspended, and the run was taken over by {holder}: ended at once"
            print(f"{self.folder}: {fault}", file=sys.stderr, flush=True)
            os._exit(ExitCode.FAILURE)

    def _is_held(self) -> bool:
        """Return whether the mark is this process's: an earlier one may still be in the cache of a network."""
        assert self._descriptor is not None
        return os.pread(self._descriptor, 4096, 0).startswith(_own_name().encode())

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beats is not None and self._descriptor is not None:
            self._left.set()
            self._beats.join()
            with contextlib.suppress(OSError):
                if self._is_held():
                    os.ftruncate(self._descriptor, 0)  # released: the next process need not wait
        self._held.close()


def _own_name() -> str:
    """Return the beginning of each mark of this process."""
    return f"process {os.getpid()} on {socket.gethostname()}\nmachine {_boot_id()}"


def _boot_id() -> str:
    """Return the id of the running kernel: containers on one kernel share its locks, whatever their host names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
