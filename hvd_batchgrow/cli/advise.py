"""`hvd-batchgrow advise`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.config.optim import AdamSection
from hvd_batchgrow.config.schedules import LrRule
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.schedule.adaptive.noise_record import read_observations
from hvd_batchgrow.schedule.advice import Advice, advise
from hvd_batchgrow.schedule.recorded_run import RecordedRun
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.storage.strict_json import dump_json

if TYPE_CHECKING:
    from hvd_batchgrow.observers.console import PlainConsole
    from hvd_batchgrow.schedule.branch_advice import CriticalBatch
    from hvd_batchgrow.schedule.branches import BranchLrRule

_SPARE = ("updates", "lr")
"""Columns of the evidence that are dropped on a narrow terminal."""


@dataclass(frozen=True)
class AdviseCommand:
    """Print, as a job file, the growth schedule that a run's gradient noise or its branches support."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished or unfinished run that has measured its gradient noise, or has branches."""
    from_branches: bool = False
    """Use the critical batches that `branch` has measured, instead of the gradient noise."""
    tolerance: float | None = None
    """With --from-branches: a batch is not worse if its loss is higher by less than this. None: see `branch`."""
    max_batch_factor: float = 2.0
    """Largest factor by which one step multiplies the batch, where the run did not change its noise scale."""
    headroom: float = 1.0
    """h: the largest advised batch is B_simple/h."""
    lr_rule: LrRule | None = None
    """Learning-rate rule for those steps; by default the run's own rule, if it has one."""
    json: bool = False
    """Print JSON, including the evidence, instead of the job file."""
    plot: Path | None = None
    """Plot B_simple, its confidence band and both batches to a .png, .svg or .pdf file."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print the job file to stdout, and the evidence to stderr even without advice."""
        from hvd_batchgrow.observers.advice_tables import advice_dict, advised_job_file, evidence_table
        from hvd_batchgrow.observers.console import NOTE
        from hvd_batchgrow.observers.console_tables import print_table

        refuse_overrides(overrides)
        self._check()
        recorded, console = read_run(self.folder), terminal(sys.stderr)
        if self.from_branches:
            return self._from_branches(recorded, console)
        try:
            advice = advise(
                recorded, max_batch_factor=self.max_batch_factor, headroom=self.headroom, lr_rule=self.lr_rule
            )
        except RunError:
            if any(o.is_measured for o in recorded.seen):
                print_table(console, evidence_table(recorded), _SPARE)
                self._draw(recorded)
            raise
        print_table(console, evidence_table(recorded, advice), _SPARE)
        for text in advice.weak:
            console.paragraph(f"too weak to rely on: {text}", NOTE)
        self._draw(recorded, advice)
        print(dump_json(advice_dict(advice), indent=2) if self.json else advised_job_file(advice), end="")
        return ExitCode.DONE

    def _from_branches(self, recorded: RecordedRun, console: PlainConsole) -> ExitCode:
        """Print the advice of the run's branches, and the evidence to stderr even without advice."""
        from hvd_batchgrow.observers.branch_advice_tables import branch_advice_dict, branch_job_file, critical_table
        from hvd_batchgrow.observers.console_tables import print_table
        from hvd_batchgrow.schedule.branch_advice import advise_from_branches

        lr_rule, found = critical_batches(self.folder, recorded, self.lr_rule, self.tolerance)
        print_table(console, critical_table(recorded, found))
        advice = advise_from_branches(recorded, found, lr_rule)
        print(dump_json(branch_advice_dict(advice), indent=2) if self.json else branch_job_file(advice), end="")
        return ExitCode.DONE

    def _draw(self, recorded: RecordedRun, advice: Advice | None = None) -> None:
        """Draw the plot if one is requested."""
        if self.plot:
            from hvd_batchgrow.observers.plot import plot_evidence

            plot_evidence(recorded, self.plot, advice)

    def _check(self) -> None:
        """Raise JobError for options out of range."""
        faults = []
        if not 1 < self.max_batch_factor < float("inf"):
            faults.append(Fault("--max-batch-factor", f"must be above 1, got {self.max_batch_factor:g}"))
        if not 0 < self.headroom < float("inf"):
            faults.append(Fault("--headroom", f"must be above 0, got {self.headroom:g}"))
        if self.tolerance is not None and not (self.from_branches and 0 < self.tolerance < float("inf")):
            fault = f"must be above 0, got {self.tolerance:g}" if self.from_branches else "is for --from-branches"
            faults.append(Fault("--tolerance", fault))
        if self.from_branches:
            given = {"--max-batch-factor": self.max_batch_factor != 2, "--headroom": self.headroom != 1}
            given["--plot"] = self.plot is not None
            faults += [Fault(flag, "is for advice from gradient noise") for flag, value in given.items() if value]
        if faults:
            raise JobError(faults, "command line")


def critical_batches(
    folder: Path, recorded: RecordedRun, lr_rule: LrRule | None, tolerance: float | None
) -> tuple[BranchLrRule, list[CriticalBatch]]:
    """Return the critical batch at each checkpoint with branches, and the learning-rate rule of these branches.

    Of several comparisons at a checkpoint, the longest counts.

    Raises:
        JobError: the rule does not fit the run.
        RunError: the run has no finished branches with the rule, or a branch is damaged.
    """
    from hvd_batchgrow.results.branch_evidence import find_branches
    from hvd_batchgrow.schedule.branch_advice import CriticalBatch, needed_lr_rule

    rule = _rule_of_branches(recorded, lr_rule, needed_lr_rule(recorded))
    branches = find_branches(folder)
    longest = {one.samples: one for one in branches if one.lr_rule == rule}  # the last is the longest
    if not longest:
        others = sorted({one.lr_rule for one in branches})
        known = f"; there are branches with {', '.join(others)}" if others else ""
        command = f"hvd-batchgrow branch {shlex.quote(str(folder))} --lr-rule {rule}"
        raise RunError(f"{folder} has no finished branches with --lr-rule {rule}{known}; train them: {command}")
    found = []
    for one in longest.values():
        results = one.compare(tolerance)
        first, last = results.results[0].record, results.results[-1].record
        found.append(
            CriticalBatch(one.samples, first.global_batch, first.lr, last.global_batch, results.critical_batch)
        )
    return rule, found


def _rule_of_branches(recorded: RecordedRun, stated: LrRule | None, needed: BranchLrRule | None) -> BranchLrRule:
    """Return the learning-rate rule of the branches to use. Raises JobError if the stated one does not fit."""
    if stated is None:
        return needed or ("sqrt" if isinstance(recorded.job.optim, AdamSection) else "linear")
    rule = _OF_BRANCHES.get(stated)
    if rule is None:
        raise JobError([Fault("--lr-rule", f"{stated!r} is not a rule of branches; use 'adam'")], "command line")
    if needed is not None and rule != needed:
        fault = f"{stated!r}: where the noise scale falls, growth takes the place of decay, which is {needed!r}"
        raise JobError([Fault("--lr-rule", fault)], "command line")
    return rule


_OF_BRANCHES: dict[LrRule, BranchLrRule] = {"none": "none", "linear": "linear", "sqrt": "sqrt", "adam": "sqrt"}
"""Learning-rate rules of jobs as those of branches."""


def read_run(folder: Path) -> RecordedRun:
    """Read the job and the noise record of a run folder.

    Raises:
        RunError: it is not a run folder, or its record is damaged.
    """
    from hvd_batchgrow.results.plan_file import read_plan

    plan = read_plan(folder)
    try:
        return RecordedRun(
            str(folder),
            parse_job(plan["job_file"], str(folder / "plan.json")),
            plan["num_samples"],
            plan["num_updates"],
            tuple(plan["phases"]),
            tuple(read_observations(read_json_lines(folder / "metrics.jsonl"))),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is not a readable run folder: {type(error).__name__}: {error}") from None
