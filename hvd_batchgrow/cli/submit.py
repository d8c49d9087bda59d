"""`hvd-batchgrow submit`."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hvd_batchgrow.cli.branch_options import BranchOptions
from hvd_batchgrow.cli.common import JobCommand, one_line, plan_with_costs, terminal
from hvd_batchgrow.config.types import NumRanks, PositiveInt
from hvd_batchgrow.interrupt import tidied_up_on_interrupt
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.results.changed_settings import refuse_changes
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.slurm.chain import (
    Script,
    Site,
    find_template,
    make_scripts,
    open_chain,
    submit_chain,
    table_lines,
)
from hvd_batchgrow.slurm.chain_jobs import make_chain_jobs, on_whole_nodes, with_ranks_per_phase
from hvd_batchgrow.slurm.ledger import DONE_BEFORE, Ledger, submitting
from hvd_batchgrow.slurm.render import dry_commands, extra_options, overriding_variables
from hvd_batchgrow.slurm.scheduler import NoSlurm, Slurm, run_command
from hvd_batchgrow.slurm.time_limit import check_time_limit


@dataclass(frozen=True)
class ClusterOptions(JobCommand):
    """Options of a run on Slurm."""

    nodes_max: NumRanks | None = None
    """Largest number of nodes for a phase; with --branch, nodes of each branch (None: as the run used last)."""
    ranks_per_node: NumRanks | None = None
    """Ranks per node: usually its number of GPUs. None: 1. With --branch: None: as the run used last; without
    --nodes-max, at most this number."""
    dry_run: bool = False
    """Print all scripts and commands without submitting anything; with --branch, also the costs."""
    resume: Literal["never", "auto"] = "never"
    """auto: resume the run of this name from its newest checkpoint, and skip jobs of the chain that are done."""
    runs_dir: Path = Path("runs")
    """Folder for run folders."""
    template: Path | None = None
    """Template of the batch script; by default slurm/train.sbatch in the working directory, else the package's."""
    partition: str | None = None
    """Slurm partition; this option and the following ones override the template."""
    account: str | None = None
    """Slurm account to charge."""
    gres: str | None = None
    """Resources per node, such as gpu:4."""
    time: str | None = None
    """Time limit of each job of the chain, or of each branch, such as 30 (minutes), 4:00:00 or 1-12 (days-hours); a job
    that reaches it is requeued and resumes."""
    signal_delay_s: PositiveInt | None = None
    """Seconds before the time limit at which a job is signalled to save and stop."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, as KEY=VALUE."""
    cost: Path | None = None
    """A file written by `probe`, or a MACHINE.toml, for layout.grow_by = "auto"; with --branch, for the times that
    --dry-run prints."""
    branch: bool = False
    """JOB is the folder of a run: submit branches of it, each as a task of an array job. The following options choose
    them, as those of `hvd-batchgrow branch` do."""

    def site_options(self) -> dict[str, str]:
        """Return the sbatch options of the command line."""
        given = {"partition": self.partition, "account": self.account, "gres": self.gres, "time": self.time}
        signal = {} if self.signal_delay_s is None else {"signal": f"B:USR2@{self.signal_delay_s}"}
        flags = {key: value for key, value in given.items() if value is not None}
        extra = extra_options(self.sbatch)
        if both := sorted(flags.keys() & extra.keys()):
            faults = [Fault("--sbatch", f"{key} is also given as --{key}: remove one of the two") for key in both]
            raise JobError(faults, "command line")
        return {**flags, **signal, **extra}

    def site(self) -> Site:
        """Return the parts of the batch scripts that the command line decides."""
        program = (sys.executable, "-P", "-m", "hvd_batchgrow.cli")  # -P: the current folder hides no module
        template, options = find_template(self.template), self.site_options()
        check_time_limit(template, options)
        return Site(template, program, options)

    def overriding(self) -> list[str]:
        """Return the variables of the environment that would override what the command line decides."""
        return overriding_variables(self.site_options(), os.environ)

    def scheduler(self) -> Slurm:
        """Return Slurm, whose commands do not get these variables."""
        return Slurm(partial(run_command, without=self.overriding()))


@dataclass(frozen=True)
class SubmitCommand(BranchOptions, ClusterOptions):
    """Submit a run to Slurm as a chain of jobs; consecutive phases with the same number of ranks share a job.

    With --branch: submit branches of a run as an array of jobs.
    """

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Submit the chain or the branches, and print their jobs and the status command."""
        try:
            return self.submit_branches(overrides) if self.branch else self.submit_chain(overrides)
        except NoSlurm as error:
            raise RunError(f"{error} --dry-run prints what would be submitted, and needs no Slurm") from None

    def submit_branches(self, overrides: dict[str, Any]) -> ExitCode:
        """Submit the branches of a run."""
        from hvd_batchgrow.cli.branch_report import print_costs
        from hvd_batchgrow.cli.submit_branches import BranchSubmission, width_of

        self.check_branch_flags(overrides)
        width = width_of(self.job, self.nodes_max, self.ranks_per_node)
        setup = self.setup_of(self.job, width.ranks)
        submission = BranchSubmission(self, setup, width, self.site())
        if self.dry_run:
            print_costs(terminal(sys.stdout), setup, self.cost)
        for line in submission.dry_run(self.overriding()) if self.dry_run else submission.submit(self.scheduler()):
            print(line, flush=True)
        return ExitCode.DONE

    def check_branch_flags(self, overrides: dict[str, Any]) -> None:
        """Raise JobError for options that have no effect with --branch."""
        faults = [Fault(key, "is a key of a job file, and branches train with the run's settings") for key in overrides]
        faults += self.factor_faults()
        given = {"--name": self.name is not None, "--seed": self.seed is not None}
        given |= {"--resume": self.resume != "never", "--runs-dir": self.runs_dir != Path("runs")}
        fault = "is for a job file, and --branch submits branches of a run that exists"
        faults += [Fault(flag, fault) for flag, is_given in given.items() if is_given]
        if self.cost is not None and not self.dry_run:
            faults.append(Fault("--cost", "is for --dry-run, which predicts the time of branches"))
        if self.job.is_file():
            near = self.job.parent if (self.job.parent / "plan.json").exists() else "runs/NAME"
            faults.append(Fault("--branch", f"needs the folder of a run, such as {near}, and {self.job} is a file"))
        if faults:
            raise JobError(faults, "command line")

    def check_chain_flags(self) -> None:
        """Raise JobError for options that have no effect without --branch, and for missing ones."""
        faults = [Fault(flag, "is for --branch, which submits branches of a run") for flag in self.stated()]
        if self.nodes_max is None:
            faults.append(Fault("--nodes-max", "is missing: the largest number of nodes for a phase"))
        if self.job.is_dir():
            fault = f"{self.job} is a folder; submit needs a job file, or --branch and the folder of a run"
            faults.append(Fault("", fault))
        if faults:
            raise JobError(faults, "command line")

    def submit_chain(self, overrides: dict[str, Any]) -> ExitCode:
        """Submit the chain."""
        self.check_chain_flags()
        nodes_max, ranks_per_node = self.nodes_max or 1, self.ranks_per_node or 1
        plan = self.plan(overrides, nodes_max, ranks_per_node)
        chain_jobs = make_chain_jobs(plan, nodes_max, ranks_per_node)
        job, run = with_ranks_per_phase(plan), self.runs_dir.absolute() / plan.job.name
        scripts = make_scripts(job, chain_jobs, run, self.site())
        scheduler = self.scheduler()
        if plan.job.layout.grow_by == "accumulation" and len(plan.layouts) > 1:
            ranks = f"one job runs all phases on {counted(plan.peak_ranks, 'rank')}"
            print(f"layout.grow_by = 'accumulation': {ranks}; 'ranks' makes one per number of ranks", file=sys.stderr)
        has_checkpoint = any((run / "checkpoints").glob("samples-*.pt"))  # without one, the run begins again
        if self.resume == "auto" and has_checkpoint and (run / "job.toml").is_file():
            before = load_job(run / "job.toml").deciding(plan.num_samples)
            refuse_changes(run, before, job.deciding(plan.num_samples))
        with nullcontext() if self.dry_run else submitting(run):
            ledger = open_chain(run, chain_jobs, None if self.dry_run else scheduler, resume=self.resume == "auto")
            if all(entry.state == DONE_BEFORE for entry in ledger.entries):
                print(f"{run} is done: there is nothing to submit")
                return ExitCode.DONE
            if self.dry_run:
                _print_dry(ledger, scripts, self.overriding())
                return ExitCode.DONE
            with tidied_up_on_interrupt():
                ledger = submit_chain(job, ledger, scripts, run, scheduler)
        print("\n".join(table_lines(ledger)))
        print(shlex.join(["hvd-batchgrow", "status", str(self.runs_dir / job.name)]))
        return ExitCode.DONE

    def plan(self, overrides: dict[str, Any], nodes_max: int, ranks_per_node: int) -> Plan:
        """Plan the whole run for all ranks of the nodes; ranks that the job does not state fill whole nodes."""
        plan = plan_with_costs(self.load(overrides), nodes_max * ranks_per_node, self.cost, ranks_per_node)
        return on_whole_nodes(plan, ranks_per_node)


def _print_dry(ledger: Ledger, scripts: list[Script], without: list[str]) -> None:
    """Print the scripts, a comment on each chain job below them, where a terminal ends, and the commands."""
    left = [script for script, e in zip(scripts, ledger.entries, strict=True) if e.state != DONE_BEFORE]
    for script in left:
        print(f"# {one_line(script.path)}\n{script.text}")
    commands = dry_commands([script.path for script in left], without)
    print("\n".join([*(f"# {line}" for line in table_lines(ledger)), *commands]))
