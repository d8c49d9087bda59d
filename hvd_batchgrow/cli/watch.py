"""`hvd-batchgrow watch`."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.config.types import FiniteSeconds
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.messages.suggest import near_path
from hvd_batchgrow.results.lock_watch import LockWatch
from hvd_batchgrow.results.run_follower import RunFollower


@dataclass(frozen=True)
class WatchCommand:
    """Show a run as it goes, from its files, also from another machine: a live view, or plain lines in a pipe."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    line_every_s: FiniteSeconds | None = None
    """Seconds between two progress lines in a pipe. By default, the job's logging.line_every_s."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Watch until the run has finished; return 75 if it stopped before, and 130 after ctrl-C."""
        from hvd_batchgrow.observers.watcher import Watcher

        refuse_overrides(overrides)
        follower, lock = RunFollower(self.folder), LockWatch(self.folder)
        if not self._may_be_run(lock):
            raise RunError(f"{self.folder} does not hold a run{near_path(self.folder)}")
        before = signal.signal(signal.SIGINT, _interrupt_once)
        try:
            return Watcher(terminal(sys.stdout), follower, lock, self.line_every_s).run()
        except KeyboardInterrupt:
            return ExitCode.INTERRUPTED
        finally:
            follower.metrics.close()
            signal.signal(signal.SIGINT, before)

    def _may_be_run(self, lock: LockWatch) -> bool:
        """Return whether the folder holds a run, one that is about to start, or a chain whose jobs still wait."""
        return any((self.folder / name).exists() for name in ("plan.json", "slurm")) or lock.look().state != "free"


def _interrupt_once(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt; ctrl-C that comes again must not keep the cursor from being shown."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
