"""The interface to the scheduler, implemented with Slurm's commands."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.slurm.render import submit_after_any_words, submit_words, test_words

_TIMEOUT_S = 120


@dataclass(frozen=True)
class JobState:
    """The state of a job in the scheduler."""

    state: str
    """As Slurm names it: PENDING, RUNNING, COMPLETED, FAILED, …"""
    reason: str = ""
    """Why the job waits or has failed."""
    restarts: int | None = None
    """How often the job was requeued; None: unknown."""
    exit_code: str = ""
    """CODE:SIGNAL, after the job has ended."""


class NoSlurm(RunError):  # noqa: N818  # the name states the fault
    """This machine has no Slurm."""


class Scheduler(Protocol):
    """The operations that chains and branches need."""

    def refusal(self, script: Path) -> str | None:
        """Return why `sbatch --test-only` refuses a script; None: it does not."""

    def submit(self, script: Path, after: int | None) -> int:
        """Submit a script, to start after another job has succeeded; return its id. Raises RunError."""

    def submit_after_any(self, script: Path, after: Sequence[int]) -> int:
        """Submit a script, to start after other jobs have ended; return its id. Raises RunError."""

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Cancel jobs."""

    def states(self, job_ids: Iterable[int]) -> dict[int, JobState]:
        """Return the states of the jobs that the scheduler still knows."""

    def queued(self, name: str) -> list[int]:
        """Return the ids of the user's jobs of this name that wait or run. Raises RunError."""

    def task_states(self, job_ids: Iterable[int]) -> dict[str, JobState]:
        """Return the states of jobs, and of each task of array jobs, that the scheduler still knows.

        Their ids are texts such as 13 and 12_4.
        """


Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(words: Sequence[str], without: Collection[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Args:
        words: the command.
        without: variables that are removed from its environment.

    Raises:
        NoSlurm: the command does not exist.
        RunError: the command does not answer.
    """
    kept = {key: value for key, value in os.environ.items() if key not in without}
    try:
        return subprocess.run(
            words, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, env=kept
        )
    except FileNotFoundError:
        raise NoSlurm(f"{words[0]} is not on PATH: is this a login node of a Slurm cluster?") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} has not answered for {_TIMEOUT_S} s: is slurmctld up?") from None


class Slurm:
    """The scheduler Slurm.

    Args:
        run: runs a command; tests replace it.
    """

    def __init__(self, run: Run = run_command) -> None:
        self._run = run

    def refusal(self, script: Path) -> str | None:
        """Return why `sbatch --test-only` refuses a script; None: it does not. Raises RunError without Slurm."""
        done = self._run(test_words(script))
        return _message(done) if done.returncode else None

    def submit(self, script: Path, after: int | None) -> int:
        """Submit a script, to start after another job has succeeded; return its id.

        Raises:
            RunError: sbatch refuses it; the message is that of sbatch.
        """
        return self._submit(script, submit_words(script, after))

    def submit_after_any(self, script: Path, after: Sequence[int]) -> int:
        """Submit a script, to start after other jobs have ended, whatever their results; return its id.

        Raises:
            RunError: sbatch refuses it; the message is that of sbatch.
        """
        return self._submit(script, submit_after_any_words(script, after))

    def _submit(self, script: Path, words: Sequence[str]) -> int:
        done = self._run(words)
        found = re.search(r"^(\d+)(?:;|$)", done.stdout, flags=re.MULTILINE)
        if done.returncode or not found:
            raise RunError(f"sbatch refuses {script}: {_message(done)}")
        return int(found[1])

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Cancel jobs. Raises RunError."""
        done = self._run(["scancel", *map(str, job_ids)])
        if done.returncode:
            raise RunError(f"scancel {' '.join(map(str, job_ids))}: {_message(done)}")

    def states(self, job_ids: Iterable[int]) -> dict[int, JobState]:
        """Return the states of jobs from squeue, with exit codes from sacct; ended jobs may be known only to sacct.

        Raises:
            RunError: squeue does not answer.
        """
        wanted = sorted(set(job_ids))
        if not wanted:
            return {}
        lines = self._queue(wanted, "--Format=JobID:24,State:24,RestartCnt:12,Reason:80")
        known = {int(job): state for job, state in map(_queue_line, lines) if job.isdigit()}
        over = [job for job in wanted if job not in known or not is_live(known[job].state)]
        for job, (state, exit_code) in self._accounts(over).items():
            before = known.get(job)
            known[job] = JobState(
                before.state if before else state,
                before.reason if before else "",
                before.restarts if before else None,
                exit_code,
            )
        return known

    def queued(self, name: str) -> list[int]:
        """Return the ids of the user's jobs of this name that wait or run; of an array, its id.

        Raises:
            RunError: squeue does not answer.
        """
        done = self._run(["squeue", "--noheader", "--me", f"--name={name}", "--format=%F"])
        if done.returncode:
            raise RunError(f"squeue: {_message(done)}")
        return sorted({int(job) for job in done.stdout.split()})

    def task_states(self, job_ids: Iterable[int]) -> dict[str, JobState]:
        """Return the states of jobs from squeue, and of each task of array jobs, by ids such as 13 and 12_4.

        Raises:
            RunError: squeue does not answer.
        """
        wanted = sorted(set(job_ids))
        lines = self._queue(wanted, "--array", "--Format=JobArrayID:36,State:24,RestartCnt:12,Reason:80")
        return dict(map(_queue_line, lines))

    def _queue(self, job_ids: Sequence[int], *words: str) -> list[str]:
        """Return the lines of squeue about jobs."""
        if not job_ids:  # squeue would list all jobs
            return []
        chosen = [f"--jobs={','.join(map(str, job_ids))}", "--states=all"]
        done = self._run(["squeue", "--noheader", *chosen, *words])
        if done.returncode and "Invalid job id" not in done.stderr:  # squeue's error for a single forgotten job
            raise RunError(f"squeue: {_message(done)}")
        return [line for line in done.stdout.splitlines() if re.match(r"\s*\d\S*\s+\S+\s+\d", line)]

    def _accounts(self, job_ids: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Return state and exit code of ended jobs, from the completion log or else from the accounting database."""
        known: dict[int, tuple[str, str]] = {}
        for source in ("-c", "-X"):
            if not (left := [job for job in job_ids if job not in known]):
                break
            words = ["sacct", source, "-n", "-P", f"--jobs={','.join(map(str, left))}"]
            done = self._run([*words, "--format=JobID,State,ExitCode"])
            lines = [line.split("|") for line in done.stdout.splitlines()]
            # The last line of a requeued job is valid. CANCELLED is followed by the user who did it.
            found = {int(job): (state.split()[0], code) for job, state, code in lines if job.isdigit()}
            if done.returncode == 0:
                known.update(found)
        return known


def refused(what: str, reasons: Mapping[str, str]) -> RunError:
    """Return the error for scripts that `sbatch --test-only` refuses.

    Args:
        what: the scripts, in words.
        reasons: the name of each refused script, with the reason. One that they all have is stated once.
    """
    head = f"sbatch --test-only refuses {what}, and nothing is submitted:"
    if len({*reasons.values()}) == 1 < len(reasons):
        return RunError(f"{head} {next(iter(reasons.values()))}")
    return RunError("\n  ".join([head, *(f"{name}: {reason}" for name, reason in reasons.items())]))


def cancel_submitted(error: RunError, job_ids: Sequence[int], scheduler: Scheduler) -> RunError:
    """Cancel the jobs that were submitted before an error, and return the error with their ids."""
    if not job_ids:
        return error
    ids = " ".join(map(str, job_ids))
    try:
        scheduler.cancel(job_ids)
    except RunError as second:
        return RunError(f"{error}\n  jobs {ids}, submitted before it, are still there: {second}")
    return RunError(f"{error}\n  cancelled the submitted jobs: {ids}")


def is_live(state: str) -> bool:
    """Return whether a job in this state may still run, or run again."""
    return state in {
        "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
        "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "SPECIAL_EXIT", "RESV_DEL_HOLD",
    }  # fmt: skip


def _queue_line(line: str) -> tuple[str, JobState]:
    """Return the id and the state of a job: the id, state, number of restarts and reason that squeue prints."""
    job, state, restarts, *rest = line.split(maxsplit=3)
    reason = rest[0].strip() if rest else ""
    return job, JobState(state, "" if reason == "None" else reason, int(restarts))


def _message(done: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a command without the prefixes `NAME: error:`."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in (done.stderr or done.stdout).splitlines()]
    return "; ".join(filter(None, lines)) or f"exit code {done.returncode}"
