"""`hvd-batchgrow advise`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.config.schedules import LrRule
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.schedule.adaptive.noise_record import read_observations
from hvd_batchgrow.schedule.advice import Advice, RecordedRun, advise
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.storage.strict_json import dump_json

_SPARE = ("updates", "lr")
"""Columns of the evidence that are dropped on a narrow terminal."""


@dataclass(frozen=True)
class AdviseCommand:
    """Print, as a job file, the growth schedule that a run's gradient noise would have supported."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished or unfinished run that has measured its gradient noise."""
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
        if faults:
            raise JobError(faults, "command line")


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
