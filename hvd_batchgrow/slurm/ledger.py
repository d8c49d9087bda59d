"""The ledger of a chain, in the run folder: which job trains which phases, and the state of each job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from hvd_batchgrow.messages.errors import RunError, unwritable
from hvd_batchgrow.slurm.chain_jobs import ChainJob
from hvd_batchgrow.slurm.ledger_file import FOLDER, LEDGER, read_ledger_file, write_ledger_file
from hvd_batchgrow.slurm.scheduler import JobState, is_live
from hvd_batchgrow.storage.file_lock import locked
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.seal import check_seal

NOT_SUBMITTED, DONE_BEFORE = "NOT SUBMITTED", "DONE BEFORE"
BEING_SUBMITTED = "BEING SUBMITTED"
"""sbatch was started; if the state stays so, `submit` ended before sbatch answered."""
GONE = "GONE"
"""Slurm no longer knows the job, and its phases are not done."""


@dataclass(frozen=True)
class Entry:
    """A chain job and its state in Slurm."""

    chain_job: ChainJob
    job_id: int | None = None
    state: str = NOT_SUBMITTED
    reason: str = ""
    restarts: int = 0
    exit_code: str = ""

    @property
    def is_live(self) -> bool:
        """Whether the job waits or runs."""
        return self.job_id is not None and is_live(self.state)

    @property
    def has_failed(self) -> bool:
        """Whether the job has ended without finishing its phases."""
        return self.job_id is not None and not self.is_live and self.state != "COMPLETED"


@dataclass(frozen=True)
class Ledger:
    """All jobs of a chain, in order."""

    name: str
    """The name of the run."""
    entries: Annotated[tuple[Entry, ...], Field(min_length=1, validation_alias="chain_jobs")]

    def with_states(self, states: Mapping[int, JobState], done_samples: int = 0) -> Ledger:
        """Return the ledger with the current states of the scheduler.

        Args:
            states: states of the jobs that the scheduler knows. A forgotten job is over. If the ledger does not know
                its result, the newest checkpoint decides whether its phases are done.
            done_samples: sample counter of the newest checkpoint.
        """
        new = (_updated(entry, states.get(entry.job_id or 0), done_samples) for entry in self.entries)
        return replace(self, entries=tuple(new))

    def with_job(self, index: int, job_id: int) -> Ledger:
        """Return the ledger after a chain job was submitted."""
        entries = list(self.entries)
        entries[index] = replace(entries[index], job_id=job_id, state="PENDING")
        return replace(self, entries=tuple(entries))

    def being_submitted(self, index: int) -> Ledger:
        """Return the ledger right before sbatch is started for a chain job."""
        entries = list(self.entries)
        entries[index] = replace(entries[index], state=BEING_SUBMITTED)
        return replace(self, entries=tuple(entries))

    def job_ids(self) -> list[int]:
        """Return the ids of all submitted jobs."""
        return [entry.job_id for entry in self.entries if entry.job_id is not None]

    def live_ids(self) -> list[int]:
        """Return the ids of the jobs that wait or run, according to the ledger."""
        return [entry.job_id for entry in self.entries if entry.is_live and entry.job_id is not None]


_LEDGERS = TypeAdapter(Ledger)
_LOCK = ".submit.lock"
"""Name of the file whose lock `submit` holds, and `status` while it writes."""


def _updated(entry: Entry, now: JobState | None, done_samples: int) -> Entry:
    if now is None and entry.is_live:
        is_done = entry.chain_job.end_samples <= done_samples
        return replace(entry, state="COMPLETED" if is_done else GONE, reason="")
    if now is None:
        return entry
    restarts = entry.restarts if now.restarts is None else now.restarts
    return replace(entry, state=now.state, reason=now.reason, restarts=restarts, exit_code=now.exit_code)


@contextmanager
def submitting(run: Path) -> Iterator[None]:
    """Lock out other `submit` commands for this run: two at once would both find no chain.

    Raises:
        RunError: another `submit` has the lock, or the folder cannot be written.
    """
    path = run / FOLDER / _LOCK
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path, wait=False))
        except BlockingIOError:
            raise RunError(f"{run} is being submitted by another process: wait for it, then run status") from None
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            yield
        finally:
            if not (path.parent / LEDGER).exists():  # nothing has been submitted, so leave no traces
                path.unlink()
                with suppress(OSError):  # a folder with other files stays
                    path.parent.rmdir()
                    run.rmdir()


def write_ledger(run: Path, ledger: Ledger) -> None:
    """Write the ledger atomically.

    Raises:
        RunError: the ledger cannot be written.
    """
    write_ledger_file(run, {"name": ledger.name, "chain_jobs": [asdict(entry) for entry in ledger.entries]})


def update_ledger(run: Path, old: Ledger, new: Ledger) -> None:
    """Replace a ledger, unless another process is writing it or has changed it meanwhile.

    Raises:
        RunError: the ledger cannot be written.
    """
    path = run / FOLDER / _LOCK
    try:
        with locked(path, wait=False):
            if read_ledger(run) == old:
                write_ledger(run, new)
    except BlockingIOError:
        return
    except OSError as error:
        raise unwritable(path, error) from None


def read_ledger(run: Path) -> Ledger | None:
    """Return the ledger of a run; None: the run was never submitted as a chain.

    Raises:
        RunError: the ledger cannot be read.
    """
    return read_ledger_file(run, _LEDGERS)


def samples_done(run: Path) -> int:
    """Return the sample counter in the name of a run's newest checkpoint; 0 without checkpoints."""
    return max(_checkpoints(run), default=0)


def samples_to_resume_from(run: Path) -> int:
    """Return the sample counter of a run's newest checkpoint that is not damaged; 0 without one."""
    for samples, path in sorted(_checkpoints(run).items(), reverse=True):
        with suppress(OSError, RunError):
            check_seal(read_regular(path))
            return samples
    return 0


def _checkpoints(run: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their sample counters."""
    named = ((re.fullmatch(r"samples-(\d+)\.pt", path.name), path) for path in (run / "checkpoints").glob("*.pt"))
    return {int(name[1]): path for name, path in named if name}
