"""Two jobs must not write one run."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from hvd_batchgrow.errors import RunError


class RunLock:
    """A lock on a run folder, held from `take` to the end of the `with` block, or of the process.

    It lies beside the folder, which may be removed and made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock.

        Raises:
            RunError: another job holds it (its host and process are named), or it cannot be written.
        """
        path = self.folder.parent / f".{self.folder.name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.folder} is being written by another job: {path.read_text().strip()}") from None
        except OSError as error:
            raise RunError(f"{error.filename or path} cannot be written: {error.strerror}") from None
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
