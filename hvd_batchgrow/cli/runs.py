"""`hvd-batchgrow list` and `show`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hvd_batchgrow.cli.common import refuse_overrides, terminal
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.messages.wording import counted, metric_texts, short_time
from hvd_batchgrow.results.run_summary import RunSummary, find_runs, read_summary
from hvd_batchgrow.storage.strict_json import dump_json


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

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout."""
        refuse_overrides(overrides)
        summary = read_summary(self.folder)
        print(dump_json(summary.to_dict(), indent=2) if self.json else "\n".join(_lines(summary)))
        return ExitCode.DONE


def _lines(run: RunSummary) -> list[str]:
    percent = 100 * run.samples / run.end_samples
    results = [] if run.last is None else [f"{run.last_dataset} {metric_texts({run.metric: run.last})[0]}"]
    if run.best is not None:
        results.append(f"best during training: {metric_texts({run.metric: run.best})[0]}")
    lines = [
        f"{run.name}: {run.state}" + (f" by {run.host}" if run.host else ""),
        f"epoch {run.epoch:.2f} of {run.epochs:.2f} ({percent:.1f} %), {run.updates:,} of {run.num_updates:,} updates",
        f"policy {run.policy}, batches {' → '.join(f'{batch:,}' for batch in run.batches)}",
        f"{short_time(run.training_s)} of training in {counted(run.attempts, 'invocation')}",
        *([", ".join(results)] if results else []),
        *([f"twin: {run.folder.parent / run.twin}"] if run.twin else []),
    ]
    lines += run.faults
    if run.state == "stopped":
        words = ["train", str(run.folder / "job.toml"), "--runs-dir", str(run.folder.parent), "--resume", "auto"]
        lines.append(f"to resume: {shlex.join(['hvd-batchgrow', *words])}")
    if run.state == "finished":
        lines.append(f"to evaluate: {shlex.join(['hvd-batchgrow', 'evaluate', str(run.folder)])}")
    return lines
