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
"""Columns of the evidence that a narrow terminal does without."""


@dataclass(frozen=True)
class AdviseCommand:
    """Print, as a job file, the growth schedule that a run's gradient noise would have supported."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a run that has measured its gradient noise, done or not."""
    max_batch_factor: float = 2.0
    """The most that one step multiplies the batch by, where the noise scale of the run stayed."""
    headroom: float = 1.0
    """h: batches up to B_simple/h."""
    lr_rule: LrRule | None = None
    """What the learning rate does as the batch grows, likewise; otherwise the run's own rule, or none."""
    json: bool = False
    """Print plain data, with what was seen, instead of the job file."""
    plot: Path | None = None
    """Draw B_simple, its band and both batches into a .png, .svg or .pdf."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """The job file on stdout; the evidence on stderr, whether there is advice or not."""
        from hvd_batchgrow.observers.advice_tables import advice_dict, advised_job_file, evidence_table
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
            console.print(f"too weak to go by: {text}", style="yellow", highlight=False, soft_wrap=True)
        self._draw(recorded, advice)
        print(dump_json(advice_dict(advice), indent=2) if self.json else advised_job_file(advice), end="")
        return ExitCode.DONE

    def _draw(self, recorded: RecordedRun, advice: Advice | None = None) -> None:
        """Where a picture is asked for."""
        if self.plot:
            from hvd_batchgrow.observers.plot import plot_evidence

            plot_evidence(recorded, self.plot, advice)

    def _check(self) -> None:
        """Raises JobError."""
        faults = []
        if not 1 < self.max_batch_factor < float("inf"):
            faults.append(Fault("--max-batch-factor", f"must be above 1, got {self.max_batch_factor:g}"))
        if not 0 < self.headroom < float("inf"):
            faults.append(Fault("--headroom", f"must be above 0, got {self.headroom:g}"))
        if faults:
            raise JobError(faults, "command line")


def read_run(folder: Path) -> RecordedRun:
    """What a run folder tells.

    Raises:
        RunError: it is none, or its record is damaged.
    """
    from hvd_batchgrow.train.run.run_folder import read_plan

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
        raise RunError(f"{folder} is no run that can be read: {type(error).__name__}: {error}") from None
