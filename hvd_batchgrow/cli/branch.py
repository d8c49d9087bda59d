"""`hvd-batchgrow branch`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, run_on_ranks, terminal
from hvd_batchgrow.comm.launcher_env import Backend, is_elastic, is_first_process
from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.config.types import NumRanks, PositiveFloat, PositiveInt
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError

if TYPE_CHECKING:
    from hvd_batchgrow.comm.ranks import Ranks
    from hvd_batchgrow.train.liveness.stop import Stop
    from hvd_batchgrow.train.run.branch_folders import BranchSetup


@dataclass(frozen=True)
class BranchCommand:
    """Measure how large the batch may be: train copies of a run from a checkpoint with larger batches, and compare."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder. It gets a folder `branches`; nothing else in it changes."""
    at: PositiveInt | None = None
    """Sample counter of the checkpoint to branch from. None: the newest one before the end of the run."""
    factors: str = "1,2,4,8"
    """Batches of the branches, as multiples of the run's batch at the checkpoint; 1 must be among them."""
    samples: PositiveInt | None = None
    """Samples that each branch trains on, rounded up to whole updates of all. None: half an epoch, at least 32 blocks.
    """
    lr_rule: Literal["auto", "none", "sqrt", "linear"] = "auto"
    """Factor of the learning rate for k times the batch: none: 1; sqrt: √k, for Adam with new β₁, β₂ and eps; linear:
    k. auto: sqrt for Adam, otherwise linear."""
    tolerance: PositiveFloat | None = None
    """A branch is not worse if its loss difference is surely below this. None: if it is not surely above 0."""
    dry_run: bool = False
    """Only print the updates, the time and the rank-hours of each branch."""
    ranks: NumRanks | None = None
    """With --dry-run: number of ranks. None: as the run used last."""
    cost: Path | None = None
    """With --dry-run: a file written by `probe`. None: the step times on record in the run."""
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
        if self.dry_run:
            if is_first_process(os.environ):
                self.print_costs()
            return ExitCode.DONE
        layout = LayoutSection()
        with suppress(JobError):  # rank 0 reports it
            layout = load_job(self.folder / "job.toml").layout
        with StopRequest() as stop:
            return run_on_ranks(lambda ranks: self.train_and_compare(ranks, stop), self.backend, layout)

    def check_flags(self) -> None:
        """Raise JobError for options that have no effect together, or no meaning."""
        faults = []
        if not self.dry_run:
            given = {"--ranks": self.ranks, "--cost": self.cost}
            fault = "is for --dry-run: the launched ranks train the branches"
            faults = [Fault(flag, fault) for flag, value in given.items() if value is not None]
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", self.factors):
            faults.append(Fault("--factors", f"must be whole numbers such as 1,2,4,8, got {self.factors!r}"))
        if is_elastic(os.environ):
            faults.append(Fault("branch", "does not run as an elastic job: launch it on fixed ranks"))
        if faults:
            raise JobError(faults, "command line")

    def setup(self, ranks: int) -> BranchSetup:
        """Return the branches on a number of ranks, from the files of the run. Raises JobError or RunError."""
        from hvd_batchgrow.train.run.branch_folders import set_up

        factors = [int(factor) for factor in self.factors.split(",")]
        rule = None if self.lr_rule == "auto" else self.lr_rule
        return set_up(self.folder, self.at, factors, self.samples, rule, ranks)

    def print_costs(self) -> None:
        """Print what the branches would cost."""
        from hvd_batchgrow.cli.branch_setup import branch_costs, ranks_of_run
        from hvd_batchgrow.observers.branch_tables import branch_cost_table
        from hvd_batchgrow.observers.console_tables import print_table
        from hvd_batchgrow.storage.strict_json import dump_json

        setup = self.setup(self.ranks or ranks_of_run(self.folder))
        costs, notes = branch_costs(setup, self.cost)
        if self.json:
            branches = [cost.to_dict() for cost in costs]
            print(dump_json({**setup.to_dict(), "branches": branches, "notes": notes}, indent=2))
            return
        console = terminal(sys.stdout)
        for line in setup.lines():
            console.print(line, highlight=False, soft_wrap=True)
        print_table(console, branch_cost_table(costs))
        for note in notes:
            console.print(note, highlight=False, soft_wrap=True)

    def train_and_compare(self, ranks: Ranks, stop: Stop) -> ExitCode:
        """Train the branches that are not finished, one after the other, and print the comparison."""
        from hvd_batchgrow.cli.branch_setup import train_branch
        from hvd_batchgrow.comm.broadcast_object import broadcast_object

        setup = ranks.run_on_rank0(lambda: self.setup(ranks.size))
        if setup is not None:
            for line in setup.lines():
                print(line, file=sys.stderr)
        works = broadcast_object(ranks, setup and [branch.work() for branch in setup.branches], "branches")
        for work in works:
            if ranks.any(flag=stop.stop_requested):
                return ExitCode.STOPPED
            if not work["is_done"] and not train_branch(work, ranks, stop).done:
                return ExitCode.STOPPED
        ranks.run_on_rank0(lambda: self.print_results(self.setup(ranks.size)))
        return ExitCode.DONE

    def print_results(self, setup: BranchSetup) -> None:
        """Print what the branches have shown; the critical batch comes last."""
        from hvd_batchgrow.observers.branch_tables import branching_table
        from hvd_batchgrow.observers.console_tables import print_table
        from hvd_batchgrow.results.branching import compare_branches, read_branch
        from hvd_batchgrow.storage.strict_json import dump_json

        start, block = setup.point.samples, setup.wanted.block
        records = [read_branch(branch.folder, branch.factor, start) for branch in setup.branches]
        found = compare_branches(records, block, self.tolerance)
        if self.json:
            print(dump_json({**setup.to_dict(), **found.to_dict()}, indent=2))
            return
        console = terminal(sys.stdout)
        for line in setup.lines():
            console.print(line, highlight=False, soft_wrap=True)
        print_table(console, branching_table(found), _SPARE)
        for line in [*found.explanation(block), found.verdict()]:
            console.print(line, highlight=False, soft_wrap=True)


_SPARE: Sequence[str] = ("lr", "updates", "not\nworse")
"""Columns that a narrow terminal can do without."""
