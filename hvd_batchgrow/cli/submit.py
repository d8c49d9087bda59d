"""`hvd-batchgrow submit`."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from hvd_batchgrow.cli.common import JobCommand
from hvd_batchgrow.config.types import NumRanks, PositiveInt
from hvd_batchgrow.interrupt import tidied_up_on_interrupt
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.slurm.chain import (
    Script,
    Site,
    find_template,
    make_scripts,
    open_chain,
    submit_chain,
    table_lines,
)
from hvd_batchgrow.slurm.chain_jobs import make_chain_jobs, with_ranks_per_phase
from hvd_batchgrow.slurm.ledger import DONE_BEFORE, Ledger, submitting
from hvd_batchgrow.slurm.render import dry_commands, extra_options
from hvd_batchgrow.slurm.scheduler import NoSlurm, Slurm


@dataclass(frozen=True)
class SubmitCommand(JobCommand):
    """Submit a run to Slurm as a chain of jobs; consecutive phases with the same number of ranks share a job."""

    nodes_max: NumRanks = tyro.MISSING
    """Largest number of nodes for a phase."""
    ranks_per_node: NumRanks = 1
    """Ranks per node: usually its number of GPUs."""
    dry_run: bool = False
    """Print all scripts and commands without submitting anything."""
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
    """Time limit of each job of the chain; a job that reaches it is requeued and resumes."""
    signal_delay_s: PositiveInt | None = None
    """Seconds before the time limit at which a job of the chain is signalled to save and stop."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, as KEY=VALUE."""
    cost: Path | None = None
    """A file written by `probe`, for layout.grow_by = "auto"."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Submit the chain, and print its jobs and the status command."""
        plan = self.plan(overrides)
        chain_jobs = make_chain_jobs(plan, self.nodes_max, self.ranks_per_node)
        job, run = with_ranks_per_phase(plan), self.runs_dir.absolute() / plan.job.name
        program = (sys.executable, "-m", "hvd_batchgrow.cli")
        site = Site(find_template(self.template), program, self.site_options())
        scripts = make_scripts(job, chain_jobs, run, site)
        scheduler = Slurm()
        if plan.job.layout.grow_by == "accumulation" and len(plan.layouts) > 1:
            ranks = f"one job runs all phases on all {plan.peak_ranks} ranks"
            print(f"layout.grow_by = 'accumulation': {ranks}; 'ranks' makes one per number of ranks", file=sys.stderr)
        with nullcontext() if self.dry_run else submitting(run):
            ledger = open_chain(run, chain_jobs, None if self.dry_run else scheduler, resume=self.resume == "auto")
            if all(entry.state == DONE_BEFORE for entry in ledger.entries):
                print(f"{run} is done: there is nothing to submit")
                return ExitCode.DONE
            if self.dry_run:
                _print_dry(ledger, scripts)
                return ExitCode.DONE
            try:
                with tidied_up_on_interrupt():
                    ledger = submit_chain(job, ledger, scripts, run, scheduler)
            except NoSlurm as error:
                raise RunError(f"{error} --dry-run prints what would be submitted, and needs no Slurm") from None
        print("\n".join(table_lines(ledger)))
        print(shlex.join(["hvd-batchgrow", "status", str(self.runs_dir / job.name)]))
        return ExitCode.DONE

    def plan(self, overrides: dict[str, Any]) -> Plan:
        """Plan the whole run for all ranks of the nodes."""
        from hvd_batchgrow.data.source_checks import known_num_samples
        from hvd_batchgrow.schedule.cost.cost import choose_ranks
        from hvd_batchgrow.schedule.cost.probe_file import load_probe

        job, ranks = self.load(overrides), self.nodes_max * self.ranks_per_node
        num_samples = known_num_samples(job.data)
        probe = load_probe(self.cost) if self.cost else None
        choose = choose_ranks(job, num_samples, probe, ranks) if probe else None
        return compile_plan(job, ranks, num_samples, choose)

    def site_options(self) -> dict[str, str]:
        """Return the sbatch options of the command line."""
        given = {"partition": self.partition, "account": self.account, "gres": self.gres, "time": self.time}
        signal = {} if self.signal_delay_s is None else {"signal": f"B:USR2@{self.signal_delay_s}"}
        flags = {key: value for key, value in given.items() if value is not None}
        return {**flags, **signal, **extra_options(self.sbatch)}


def _print_dry(ledger: Ledger, scripts: list[Script]) -> None:
    left = [script for script, e in zip(scripts, ledger.entries, strict=True) if e.state != DONE_BEFORE]
    for script in left:
        print(f"# {_shown(script.path)}\n{script.text}")
    print("\n".join(dry_commands([script.path for script in left])))


def _shown(path: Path) -> str:
    """Return a path as one printable line."""
    text = str(path)
    return text if text.isprintable() else repr(text)
