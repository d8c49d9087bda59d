"""`hvd-batchgrow status`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.messages.suggest import near_run
from hvd_batchgrow.slurm.branch_ledger import job_ids
from hvd_batchgrow.slurm.branch_status import SubmittedBranches, submitted_branches
from hvd_batchgrow.slurm.chain import table_lines, trouble_lines
from hvd_batchgrow.slurm.ledger import Ledger, read_ledger, samples_done, update_ledger
from hvd_batchgrow.slurm.scheduler import NoSlurm, Slurm


@dataclass(frozen=True)
class StatusCommand:
    """Print the state of a chain and of submitted branches; the exit code is 1 if a job has failed."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Query Slurm, update the ledger, and print it."""
        refuse_overrides(overrides)
        ledger, branches = read_ledger(self.folder), submitted_branches(self.folder)
        if ledger is None and not branches:
            if not self.folder.is_dir():
                raise RunError(f"{self.folder} is not a folder{near_run(self.folder)}")
            raise RunError(
                f"{self.folder} holds no chain and no submitted branches: hvd-batchgrow submit makes them in runs/NAME"
            )
        troubles = [*(self._chain(ledger) if ledger else []), *_branches(branches)]
        print("\n".join(troubles), end="\n" if troubles else "")
        return ExitCode.FAILURE if troubles else ExitCode.DONE

    def _chain(self, ledger: Ledger) -> list[str]:
        """Update the ledger, print it, and return why the chain is broken."""
        done_samples = samples_done(self.folder)
        try:
            known = Slurm().states(ledger.job_ids())
        except NoSlurm:
            _print_chain(ledger, done_samples)
            raise RunError("squeue is not available: this is the ledger as submit or status last wrote it") from None
        now = ledger.with_states(known, done_samples)
        _print_chain(now, done_samples)
        if now != ledger:
            try:
                update_ledger(self.folder, ledger, now)
            except RunError as error:  # another user's chain, or a read-only mount
                print(f"note: {error}; the ledger keeps the states that submit or status wrote last", file=sys.stderr)
        return list(trouble_lines(now, self.folder))


def _branches(submitted: Sequence[SubmittedBranches]) -> list[str]:
    """Print the jobs of branches, and return what has failed."""
    states = Slurm().task_states([job for one in submitted for job in job_ids(one.submissions)])
    for one in submitted:
        print("\n".join(one.lines(states)))
    return [line for one in submitted for line in one.troubles(states)]


def _print_chain(ledger: Ledger, done_samples: int) -> None:
    print("\n".join(table_lines(ledger)))
    print(f"newest checkpoint: {done_samples:,} of {ledger.entries[-1].chain_job.end_samples:,} samples")
