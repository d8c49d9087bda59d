"""The ledger of the branches of a checkpoint, in their folder: which Slurm jobs train and compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from hvd_batchgrow.slurm.ledger_file import read_ledger_file, write_ledger_file
from hvd_batchgrow.slurm.scheduler import JobState, is_live


@dataclass(frozen=True)
class Submission:
    """An array job with a task for each branch, and the job that compares the branches."""

    factors: tuple[int, ...]
    """k of the branches that the array trains; also the indices of its tasks."""
    array: int | None = None
    """None: sbatch has not answered before `submit` ended. Likewise for `table`."""
    table: int | None = None

    def job_ids(self) -> list[int]:
        """Return the ids of the submitted jobs."""
        return [job for job in (self.array, self.table) if job is not None]

    def task(self, factor: int) -> str:
        """Return the id of the task of a branch."""
        return f"{self.array}_{factor}"


@dataclass(frozen=True)
class _Ledger:
    submissions: tuple[Submission, ...]


_LEDGERS = TypeAdapter(_Ledger)


def run_name(run: Path) -> str:
    """Return the name of a run folder, also of one such as `.`: jobs and their logs are named after it."""
    return run.resolve().name


def write_submissions(folder: Path, submissions: Sequence[Submission]) -> None:
    """Write the ledger atomically.

    Raises:
        RunError: the ledger cannot be written.
    """
    write_ledger_file(folder, {"submissions": [asdict(submission) for submission in submissions]})


def read_submissions(folder: Path) -> tuple[Submission, ...]:
    """Return what was submitted, in order; nothing if there is no ledger.

    Raises:
        RunError: the ledger cannot be read.
    """
    found = read_ledger_file(folder, _LEDGERS)
    return found.submissions if found else ()


def job_ids(submissions: Sequence[Submission]) -> list[int]:
    """Return the ids of all submitted jobs."""
    return [job for submission in submissions for job in submission.job_ids()]


def live_tasks(submissions: Sequence[Submission], states: Mapping[str, JobState]) -> dict[int, str]:
    """Return the ids of the tasks that wait or run, by factor.

    Args:
        submissions: from the ledger.
        states: of the jobs and tasks that the scheduler knows.
    """
    tasks = {factor: one.task(factor) for one in submissions for factor in one.factors}
    return {factor: task for factor, task in tasks.items() if _is_live(states, task)}


def live_tables(submissions: Sequence[Submission], states: Mapping[str, JobState]) -> list[Submission]:
    """Return the submissions whose comparison still waits or runs."""
    return [one for one in submissions if _is_live(states, str(one.table))]


def live_jobs(states: Mapping[str, JobState]) -> list[int]:
    """Return the ids of the jobs that wait or run; of an array, its id."""
    return sorted({int(job.partition("_")[0]) for job in states if _is_live(states, job)})


def _is_live(states: Mapping[str, JobState], job: str) -> bool:
    return job in states and is_live(states[job].state)
