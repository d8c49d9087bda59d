"""Report the Slurm jobs of branches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_batchgrow.schedule.branches import parse_branches_folder
from hvd_batchgrow.slurm.branch_jobs import TABLE_FILES, table_log, task_log
from hvd_batchgrow.slurm.branch_ledger import Submission, live_tasks, read_submissions, run_name
from hvd_batchgrow.slurm.ledger import GONE, samples_done
from hvd_batchgrow.slurm.scheduler import JobState, is_live


@dataclass(frozen=True)
class SubmittedBranches:
    """The branches of a checkpoint that were submitted to Slurm."""

    run: Path
    folder: Path
    end_samples: int
    """Sample counter at which they end."""
    submissions: tuple[Submission, ...]

    def lines(self, states: Mapping[str, JobState]) -> Iterator[str]:
        """Yield a line for each branch and one for the comparison.

        Args:
            states: of the jobs and tasks that the scheduler knows.
        """
        yield f"branches in {self.folder}:"
        for factor, last in self._newest().items():
            state = "trained" if self._is_trained(factor) else _state(last.task(factor), last.array, states)
            yield f"  k = {factor}: {state}"
        last = self.submissions[-1]
        log = f"; log: {table_log(self.folder, run_name(self.run), last)}" if last.table else ""
        yield f"  table: {_state(str(last.table), last.table, states)}{log}"

    def troubles(self, states: Mapping[str, JobState]) -> Iterator[str]:
        """Yield the branches whose jobs have ended without finishing them, and the remedy."""
        live = live_tasks(self.submissions, states)
        newest = self._newest().items()
        failed = [(k, last) for k, last in newest if k not in live and not self._is_trained(k)]
        for factor, last in failed:
            if last.array is None:
                yield f"submit was interrupted while it submitted k = {factor}: squeue --me shows whether a job waits"
            else:
                yield f"k = {factor} is not trained; see {task_log(self.folder, run_name(self.run), last, factor)}"
        if failed:
            yield "fix the cause, then repeat the command that submitted the branches: it submits only these"
        last = self.submissions[-1]
        is_waiting = live or is_live(states.get(str(last.table), JobState(GONE)).state)
        if last.table and not failed and not is_waiting and not (self.folder / TABLE_FILES[0]).exists():
            log = table_log(self.folder, run_name(self.run), last)
            yield f"the table was not printed; see {log}, or run branch with --table"

    def _newest(self) -> dict[int, Submission]:
        """Return the last submission of each branch, by ascending factor."""
        newest = {factor: one for one in self.submissions for factor in one.factors}
        return dict(sorted(newest.items()))

    def _is_trained(self, factor: int) -> bool:
        return samples_done(self.folder / f"k{factor}") >= self.end_samples


def submitted_branches(run: Path) -> list[SubmittedBranches]:
    """Return the branches of a run that were submitted to Slurm, by checkpoint. Raises RunError."""
    found = []
    for folder in (run / "branches").glob("at-*-for-*"):
        name = parse_branches_folder(folder.name)
        if name and (submissions := read_submissions(folder)):
            start, num_samples, _ = name
            found.append((start, SubmittedBranches(run, folder, start + num_samples, submissions)))
    return [branches for _, branches in sorted(found, key=lambda pair: (pair[0], str(pair[1].folder)))]


def _state(job: str, job_id: int | None, states: Mapping[str, JobState]) -> str:
    if job_id is None:
        return "not submitted"
    now = states.get(job, JobState(GONE))
    parts = [f"job {job} {'is unknown to Slurm by now' if now.state == GONE else now.state}"]
    parts += [now.reason] if now.reason not in {"", "NonZeroExitCode"} else []
    parts += [f"requeued {now.restarts} ×"] if now.restarts else []
    return ", ".join(parts)
