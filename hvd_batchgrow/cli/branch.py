"""`hvd-batchgrow branch`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hvd_batchgrow.cli.branch_options import BranchOptions
from hvd_batchgrow.cli.common import refuse_overrides, run_on_ranks, terminal, unfinished_until_done
from hvd_batchgrow.comm.launcher_env import Backend, is_elastic, is_first_process
from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.config.types import NumRanks, PositiveInt
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError
from hvd_batchgrow.storage.strict_json import dump_json

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.train.liveness.stop import Stop
    from hvd_batchgrow.train.run.branch_folders import BranchSetup


@dataclass(frozen=True)
class BranchCommand(BranchOptions):
    """Measure how large the batch may be: train copies of a run from a checkpoint with larger batches, and compare."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder. It gets a folder `branches`; nothing else in it changes."""
    only: PositiveInt | None = None
    """Train only the branch of this factor, one of --factors, and print no comparison: for several machines or jobs."""
    table: bool = False
    """Train nothing. Print the comparison of finished branches, and write it to table.txt and table.json beside them.
    """
    dry_run: bool = False
    """Only print the updates, the time and the rank-hours of each branch."""
    ranks: NumRanks | None = None
    """With --dry-run: number of ranks. None: as the run used last."""
    cost: Path | None = None
    """With --dry-run: a file written by `probe`, or a MACHINE.toml. None: the step times on record in the run."""
    json: bool = False
    """Print one JSON object."""
    backend: Backend = "auto"
    """Library for collectives. auto: Horovod; torch.distributed under torchrun, without Horovod, or if it cannot sum
    on the GPUs."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print the comparison; return 75 if stopped before all branches are trained."""
        from hvd_batchgrow.train.liveness.stop import StopRequest

        refuse_overrides(overrides)
        self.check_flags()
        if self.dry_run or self.table:
            if is_first_process(os.environ):
                if self.dry_run:
                    self.print_costs()
                else:
                    self.print_table()
            return ExitCode.DONE
        layout = LayoutSection()
        with suppress(JobError):  # rank 0 reports it
            layout = load_job(self.folder / "job.toml").layout
        with StopRequest() as stop:
            return run_on_ranks(lambda ranks: self.train_and_compare(ranks, stop), self.backend, layout)

    def check_flags(self) -> None:
        """Raise JobError for options that have no effect together, or no meaning."""
        faults = list(self.factor_faults())
        given = {"--ranks": self.ranks, "--cost": self.cost}
        if not self.dry_run:
            fault = "is for --dry-run; branches train on the launched ranks"
            faults += [Fault(flag, fault) for flag, value in given.items() if value is not None]
        if self.table and self.dry_run:
            faults.append(
                Fault("--table", "prints a comparison of finished branches, --dry-run their costs: choose one")
            )
        if self.only is not None:
            others = {"--dry-run": self.dry_run, "--table": self.table, "--json": self.json}
            others["--tolerance"] = self.tolerance is not None
            fault = "has no effect with --only, which prints neither costs nor a comparison"
            faults += [Fault(flag, fault) for flag, value in others.items() if value]
            if not faults and self.only not in map(int, self.factors.split(",")):
                faults.append(Fault("--only", f"must be one of --factors {self.factors}, got {self.only}"))
        if is_elastic(os.environ):
            faults.append(Fault("branch", "does not run as an elastic job: launch it on fixed ranks"))
        if faults:
            raise JobError(faults, "command line")

    def print_costs(self) -> None:
        """Print what the branches would cost."""
        from hvd_batchgrow.cli.branch_report import costs_tree, print_costs
        from hvd_batchgrow.cli.branch_setup import ranks_of_run

        setup = self.setup_of(self.folder, self.ranks or ranks_of_run(self.folder))
        if self.json:
            print(dump_json(costs_tree(setup, self.cost), indent=2))
        else:
            print_costs(terminal(sys.stdout), setup, self.cost)

    def print_table(self) -> None:
        """Print and store the comparison of finished branches. Raises RunError if a branch is not finished."""
        from hvd_batchgrow.cli.branch_report import refuse_unfinished

        setup = self.setup_of(self.folder, ranks=1)  # which can form every batch
        refuse_unfinished(setup, self.branch_words(self.folder, setup.point.samples))
        self.print_results(setup, store=True)

    def train_and_compare(self, ranks: Ranks, stop: Stop) -> ExitCode:
        """Train the branches that are not finished, one after the other, and print the comparison."""
        code = unfinished_until_done(ranks, lambda: self.train(ranks, stop))
        if code == ExitCode.DONE and self.only is None:
            ranks.run_on_rank0(lambda: self.print_results(self.setup_of(self.folder, ranks.size)))
        return code

    def train(self, ranks: Ranks, stop: Stop) -> ExitCode:
        """Train the branches that are not finished; with --only, only this one."""
        from hvd_batchgrow.cli.branch_setup import train_branch
        from hvd_batchgrow.comm.broadcast_object import broadcast_object

        setup = ranks.run_on_rank0(lambda: self.setup_of(self.folder, ranks.size))
        branches = [] if setup is None else [b for b in setup.branches if self.only in {None, b.factor}]
        if setup is not None:
            print("\n".join(setup.lines()), file=sys.stderr)
            if self.only is not None and branches[0].is_done:
                print(f"{branches[0].folder} is trained already", file=sys.stderr)
        works = broadcast_object(ranks, setup and [branch.work() for branch in branches], "branches")
        for work in works:
            if ranks.any(flag=stop.stop_requested):
                return ExitCode.STOPPED
            if not work["is_done"] and not train_branch(work, ranks, stop).done:
                return ExitCode.STOPPED
        return ExitCode.DONE

    def print_results(self, setup: BranchSetup, *, store: bool = False) -> None:
        """Print what the branches have shown; `store`: also write it into their folder."""
        from hvd_batchgrow.cli.branch_report import compare, comparison_tree, print_comparison, store_comparison

        found = compare(setup, self.tolerance)
        if store:
            store_comparison(setup, found)
        if self.json:
            print(dump_json(comparison_tree(setup, found), indent=2))
        else:
            print_comparison(terminal(sys.stdout), setup, found)
