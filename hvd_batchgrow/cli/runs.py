"""`hvd-batchgrow list` and `show`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.config.types import Price
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.storage.strict_json import dump_json

if TYPE_CHECKING:  # the help of all commands does not need numpy
    from hvd_batchgrow.results.run_summary import RunSummary


@dataclass(frozen=True)
class ListCommand:
    """Print the runs of a folder: state, results, updates, time, schedule and twin."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder of run folders."""
    json: bool = False
    """Print one JSON object per run, on one line."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout; report damaged runs on stderr, and then return 1."""
        from hvd_batchgrow.observers.console_tables import print_table, runs_table
        from hvd_batchgrow.results.run_summary import find_runs, read_summary

        refuse_overrides(overrides)
        summaries, is_damaged = [], False
        for path in find_runs(self.folder):
            try:
                summaries.append(read_summary(path))
                faults: Sequence[str] = summaries[-1].faults
            except RunError as error:
                faults = [str(error)]
            for fault in faults:
                is_damaged = True
                print(fault, file=sys.stderr)
        if self.json:
            for summary in summaries:
                print(dump_json(summary.to_dict()))
        elif summaries:
            print_table(terminal(sys.stdout), runs_table(summaries), ["twin", "updates", "batch", "time"])
        return ExitCode.FAILURE if is_damaged else ExitCode.DONE


@dataclass(frozen=True)
class ShowCommand:
    """Print what a run has done so far, and the command that resumes it."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    json: bool = False
    """Print one JSON object."""
    price: Price | None = None
    """Price of one rank-hour, in any currency: print the cost of the run. None: print no cost."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout."""
        from hvd_batchgrow.observers.end_block import print_end_block
        from hvd_batchgrow.results.account import account_of
        from hvd_batchgrow.results.run_files import RunFiles
        from hvd_batchgrow.results.run_summary import summarize

        refuse_overrides(overrides)
        run = RunFiles.read(self.folder)
        summary = summarize(run)
        if self.json:
            account = account_of(run).to_dict(self.price)
            print(dump_json({**summary.to_dict(), "account": account}, indent=2))
            return ExitCode.DONE
        print("\n".join(_heading(summary)))
        print_end_block(terminal(sys.stdout), run, self.price)
        print("\n".join([*summary.faults, *_next_commands(summary)]))
        return ExitCode.DONE


def _heading(run: RunSummary) -> list[str]:
    percent = 100 * run.samples / run.end_samples
    return [
        f"{run.name}: {run.state_text}" + (f" by {run.host}" if run.host else ""),
        f"epoch {run.epoch:.2f} of {run.epochs:.2f} ({percent:.1f} %), {run.updates:,} of {run.num_updates:,} updates",
        f"policy {run.policy}, batches {' → '.join(f'{batch:,}' for batch in run.batches)}",
        *([f"twin: {run.folder.parent / run.twin}"] if run.twin else []),
    ]


def _next_commands(run: RunSummary) -> list[str]:
    from hvd_batchgrow.results.run_summary import command, resume_command

    if run.state == "failed":
        return [f"to resume after the cause is fixed: {resume_command(run.folder)}"]
    if run.state == "stopped":
        return [f"to resume: {resume_command(run.folder)}"]
    if run.state == "finished":
        return [f"to evaluate: {command('evaluate', run.folder)}"]
    return []
