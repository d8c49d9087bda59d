"""`hvd-batchgrow watch`."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.config.types import FiniteSeconds
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.messages.suggest import near_run
from hvd_batchgrow.slurm.ledger_file import FOLDER, LEDGER

if TYPE_CHECKING:  # the help of all commands does not need numpy
    from hvd_batchgrow.results.lock_watch import LockWatch


@dataclass(frozen=True)
class WatchCommand:
    """Follow a run that another process or machine trains: a live view on a terminal, plain lines in a pipe."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    line_every_s: FiniteSeconds | None = None
    """Seconds between two progress lines in a pipe. None: the job's logging.line_every_s."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Watch until the run has finished; return 75 if it stopped before, 1 after its error, and 130 after ctrl-C."""
        from hvd_batchgrow.observers.watcher import Watcher
        from hvd_batchgrow.results.lock_watch import LockWatch
        from hvd_batchgrow.results.run_follower import RunFollower

        refuse_overrides(overrides)
        follower, lock = RunFollower(self.folder), LockWatch(self.folder)
        if not self._may_be_run(lock):
            raise RunError(f"{self.folder} does not hold a run{near_run(self.folder)}")
        before = signal.signal(signal.SIGINT, _interrupt_once)
        try:
            return Watcher(terminal(sys.stdout), follower, lock, self.line_every_s).run()
        except KeyboardInterrupt:
            return ExitCode.INTERRUPTED
        finally:
            follower.metrics.close()
            follower.branches.close()
            signal.signal(signal.SIGINT, before)

    def _may_be_run(self, lock: LockWatch) -> bool:
        """Return whether the folder has a run, a run that is about to start, or a chain of waiting jobs."""
        files = (self.folder / "plan.json", self.folder / FOLDER / LEDGER)
        return any(path.exists() for path in files) or lock.look().state != "free"


def _interrupt_once(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt, and ignore further ctrl-C, so that the cursor is shown again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
