"""The branches of a run as Slurm jobs: an array with a task for each branch, and a job that prints their comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvd_batchgrow.messages.errors import RunError, unwritable
from hvd_batchgrow.slurm.branch_ledger import Submission, read_submissions, write_submissions
from hvd_batchgrow.slurm.chain import Script, Site
from hvd_batchgrow.slurm.ledger_file import FOLDER
from hvd_batchgrow.slurm.render import log_pattern, render
from hvd_batchgrow.slurm.scheduler import Scheduler, cancel_submitted, refused

_TASK = "SLURM_ARRAY_TASK_ID"
"""Variable of a task with its index in the array, which is the factor of its branch."""
TABLE_FILES = ("table.txt", "table.json")
"""What the job that prints the comparison writes into the folder of the branches."""
_TABLE_TIME = "00:10:00"
"""Time limit of the job that prints the comparison, which reads a few files."""


@dataclass(frozen=True)
class BranchArray:
    """The jobs that train and compare branches."""

    folder: Path
    """Folder of the branches, absolute."""
    name: str
    """Name of the run."""
    words: tuple[str, ...]
    """Arguments of `branch`, with an absolute run folder, for the comparison of all branches."""
    task_words: tuple[str, ...]
    """The same for training, without options that have an effect on the comparison only."""
    factors: tuple[int, ...]
    """k of the branches to train."""
    nodes: int
    ranks_per_node: int

    def scripts(self, site: Site) -> tuple[Script, Script]:
        """Return the scripts of the array and of the comparison, without writing them. Raises JobError."""
        folder = self.folder / FOLDER
        array = {
            "job-name": f"{self.name}-branches",
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.ranks_per_node),
            "ntasks": str(self.nodes * self.ranks_per_node),
            "array": ",".join(map(str, self.factors)),
            "output": log_pattern(folder, "%x-%A_%a"),
        }
        table = {
            "job-name": f"{self.name}-table",
            "nodes": "1",
            "ntasks-per-node": "1",
            "ntasks": "1",
            "output": log_pattern(folder),
        }
        words = [*self.task_words, "--only"]
        train = render(site.template, {**array, **site.options}, site.program, words, "branch", _TASK)
        options = {**table, **site.options, "time": _TABLE_TIME}
        compare = render(site.template, options, site.program, [*self.words, "--table"], "branch")
        return Script(folder / "branches.sbatch", train), Script(folder / "table.sbatch", compare)


def task_log(folder: Path, name: str, submission: Submission, factor: int) -> Path:
    """Return the log of a branch's task."""
    return folder / FOLDER / f"{name}-branches-{submission.array}_{factor}.out"


def table_log(folder: Path, name: str, submission: Submission) -> Path:
    """Return the log of the job that prints the comparison."""
    return folder / FOLDER / f"{name}-table-{submission.table}.out"


def submit_branches(
    array: BranchArray, scripts: Sequence[Script], after: Sequence[int], scheduler: Scheduler
) -> Submission:
    """Write the scripts, test whether Slurm could run both, and submit them.

    Args:
        array: the jobs.
        scripts: of `BranchArray.scripts`.
        after: further jobs for which the comparison waits.
        scheduler: the scheduler.

    Raises:
        RunError: `sbatch --test-only` refuses a script, and nothing is submitted; or a script is refused later, or the
            ledger cannot be written, and the array is cancelled.
    """
    folder = array.folder / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for script in scripts:
            script.path.write_text(script.text, "utf-8")
    except OSError as error:
        raise unwritable(error.filename or folder, error) from None
    reasons = {str(script.path): reason for script in scripts if (reason := scheduler.refusal(script.path))}
    if reasons:
        raise refused("these scripts", reasons)
    before, now = read_submissions(array.folder), Submission(array.factors)
    try:
        # Write the ledger before and right after sbatch: a job that is not in the ledger would be unknown later.
        write_submissions(array.folder, (*before, now))
        now = replace(now, array=scheduler.submit(scripts[0].path, None))
        write_submissions(array.folder, (*before, now))
        for name in TABLE_FILES:  # `status` reports a table job that writes none
            (array.folder / name).unlink(missing_ok=True)
        now = replace(now, table=scheduler.submit_after_any(scripts[1].path, [*now.job_ids(), *after]))
        write_submissions(array.folder, (*before, now))
    except RunError as error:
        with contextlib.suppress(RunError):
            write_submissions(array.folder, (*before, now) if now.job_ids() else before)
        raise cancel_submitted(error, now.job_ids(), scheduler) from None
    except KeyboardInterrupt:
        stopped = RunError("interrupted during sbatch: squeue --me shows whether Slurm has accepted a job")
        raise cancel_submitted(stopped, now.job_ids(), scheduler) from None
    return now
