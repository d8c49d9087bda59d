"""`hvd-batchgrow submit RUN --branch`: the branches of a run as an array of Slurm jobs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvd_batchgrow.cli.branch_options import BranchOptions
from hvd_batchgrow.cli.branch_setup import ranks_of_attempt
from hvd_batchgrow.cli.common import one_line
from hvd_batchgrow.interrupt import tidied_up_on_interrupt
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.slurm.branch_jobs import BranchArray, submit_branches, table_log
from hvd_batchgrow.slurm.branch_ledger import job_ids, live_jobs, live_tables, live_tasks, read_submissions, run_name
from hvd_batchgrow.slurm.branch_status import submitted_branches
from hvd_batchgrow.slurm.chain import Site, interrupted
from hvd_batchgrow.slurm.ledger import submitting
from hvd_batchgrow.slurm.render import submit_after_any_words, submit_words, test_words, unset_line
from hvd_batchgrow.slurm.scheduler import Scheduler
from hvd_batchgrow.train.run.branch_folders import BranchSetup


@dataclass(frozen=True)
class Width:
    """The nodes of each branch, and the ranks on each of them."""

    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """Ranks that train a branch."""
        return self.nodes * self.ranks_per_node


def width_of(run: Path, nodes: int | None, ranks_per_node: int | None) -> Width:
    """Return on how many nodes and ranks the branches train.

    Args:
        run: the run folder.
        nodes: of each branch; None: as many as the ranks that the run used last need.
        ranks_per_node: None: as the run used last.

    Raises:
        JobError: the ranks of the run do not fill whole nodes.
        RunError: the run cannot be read.
    """
    last = RunFiles.read(run).last_attempt
    ranks = ranks_of_attempt(last)
    hardware = last.get("hardware")
    hosts = hardware.get("gpus_per_host") if isinstance(hardware, dict) else None
    num_hosts = len(hosts) if isinstance(hosts, list) and hosts else 1
    each = ranks_per_node or -(-ranks // num_hosts)
    if nodes is not None:
        return Width(nodes, each)
    if ranks <= each:
        return Width(1, ranks)
    if ranks % each:
        fault = f"the run used {ranks} ranks, which are {ranks / each:.2f} nodes of {each}"
        nearest = f"--nodes-max {ranks // each} or {ranks // each + 1} with --ranks-per-node {each}"
        raise JobError([Fault("--ranks-per-node", f"{fault}; nearest: {nearest}")], "command line")
    return Width(ranks // each, each)


@dataclass(frozen=True)
class BranchSubmission:
    """The branches of a run, to be submitted."""

    options: BranchOptions
    setup: BranchSetup
    width: Width
    site: Site

    def submit(self, scheduler: Scheduler) -> Iterator[str]:
        """Submit the branches that are neither trained nor submitted before; yield what to print. Raises RunError."""
        folder, name = self.setup.folder, run_name(self.setup.run)
        with submitting(folder):
            before = read_submissions(folder)
            states = scheduler.task_states(job_ids(before))
            if any(one.array is None or one.table is None for one in before):
                self._refuse_unknown(scheduler)
            live, tables = live_tasks(before, states), live_tables(before, states)
            left = self._left()
            if not (factors := [factor for factor in left if factor not in live]):
                logs = [table_log(folder, name, one) for one in tables]
                yield from self._nothing_to_submit([live[factor] for factor in left], logs)
                return
            array = self._array(factors)
            # Also after a table that was submitted before, because both write the same files
            with tidied_up_on_interrupt():
                now = submit_branches(array, array.scripts(self.site), live_jobs(states), scheduler)
        for branch in self.setup.branches:
            if branch.is_done:
                yield f"k = {branch.factor}: trained already"
            elif branch.factor in factors:
                yield f"k = {branch.factor}: job {now.task(branch.factor)}"
            else:
                yield f"k = {branch.factor}: job {live[branch.factor]}, submitted before"
        yield f"table: job {now.table}, when all of them have ended: {table_log(folder, name, now)}"
        yield shlex.join(["hvd-batchgrow", "status", str(self.setup.run)])

    def _refuse_unknown(self, scheduler: Scheduler) -> None:
        """Raise RunError if jobs are queued that may be those of a killed `submit`: no ledger of the run has them."""
        run = self.setup.run
        known = {job for branches in submitted_branches(run) for job in job_ids(branches.submissions)}
        for name in (f"{run_name(run)}-branches", f"{run_name(run)}-table"):
            if queued := sorted({*scheduler.queued(name)} - known):
                raise interrupted("branches", name, queued)

    def dry_run(self, without: Sequence[str]) -> Iterator[str]:
        """Yield the scripts and the commands, which first remove the variables `without`."""
        if not (factors := self._left()):
            yield from self._nothing_to_submit([], [])
            return
        scripts = self._array(factors).scripts(self.site)
        yield from (f"# {one_line(script.path)}\n{script.text}" for script in scripts)
        array, table = (script.path for script in scripts)
        yield from unset_line(without)
        yield from (shlex.join(test_words(path)) for path in (array, table))
        yield f"job_1=$({shlex.join(submit_words(array, None))})"
        words = shlex.join(submit_after_any_words(table, [0]))  # 0 is a placeholder for the shell's variable
        yield words.replace("--dependency=afterany:0", '--dependency=afterany:"$job_1"', 1)

    def _left(self) -> list[int]:
        """Return the factors of the branches that are not trained."""
        return [branch.factor for branch in self.setup.branches if not branch.is_done]

    def _array(self, factors: Sequence[int]) -> BranchArray:
        run, start = self.setup.run.absolute(), self.setup.point.samples
        return BranchArray(
            folder=self.setup.folder.absolute(),
            name=run_name(run),
            words=tuple(self.options.branch_words(run, start)),
            task_words=tuple(replace(self.options, tolerance=None).branch_words(run, start)),
            factors=tuple(factors),
            nodes=self.width.nodes,
            ranks_per_node=self.width.ranks_per_node,
        )

    def _nothing_to_submit(self, tasks: Sequence[str], logs: Sequence[Path]) -> Iterator[str]:
        """Yield why nothing is submitted, and the command that prints the comparison."""
        if tasks:
            those = f"job {tasks[0]} is" if len(tasks) == 1 else f"jobs {', '.join(tasks)} are"
            yield f"nothing to submit: {those} waiting or running already"
            yield from (f"the table will be in {log}" for log in logs)
            yield "to print it when all of them have ended:"
        else:
            yield "nothing to submit: all branches are trained; to print their table:"
        words = self.options.branch_words(self.setup.run, self.setup.point.samples)
        yield shlex.join(["hvd-batchgrow", "branch", *words, "--table"])
