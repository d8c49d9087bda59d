"""Advice from branches: the evidence as a table, the job file with its comments, and plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from hvd_batchgrow.observers.advice_tables import against_run, commented_job_file, in_place_of_decay
from hvd_batchgrow.observers.console_tables import number_table
from hvd_batchgrow.schedule.branch_advice import BranchAdvice, CriticalBatch
from hvd_batchgrow.schedule.recorded_run import RecordedRun


def critical_table(run: RecordedRun, found: Sequence[CriticalBatch]) -> Table:
    """Return a table of the critical batch at each checkpoint."""
    columns = ("sample", "epoch", "batch", "lr", "largest tried", "critical batch")
    table = number_table(f"{run.folder}: N = {run.num_samples:,}; branches", columns)
    for one in found:
        epoch = f"{one.samples / run.num_samples:.2f}"
        critical = f"{'at least ' if one.is_bound else ''}{one.critical:,}"
        table.add_row(f"{one.samples:,}", epoch, f"{one.global_batch:,}", f"{one.lr:.4g}", f"{one.largest:,}", critical)
    return table


def branch_job_file(advice: BranchAdvice) -> str:
    """Return the advised job as TOML, with the evidence in comments."""
    return commented_job_file(_head(advice), advice.job)


def _head(advice: BranchAdvice) -> list[str]:
    noise = (
        in_place_of_decay(advice.run, "up to the critical batch")
        if advice.run.noise_fell
        else f"The batch grows to the critical batch of each checkpoint; lr follows it as in the branches "
        f"({advice.lr_rule})."
    )
    return [
        f"Advice from the branches of {' '.join(advice.run.folder.split())}.",
        f"{against_run(advice.plan.num_updates, advice.run.num_updates)} {noise}",
        *(
            f"- epoch {one.samples / advice.run.num_samples:.2f}: critical batch "
            f"{'at least ' if one.is_bound else ''}{one.critical:,} (batch of the run {one.global_batch:,})"
            for one in advice.found
        ),
        "A critical batch is measured over the samples of its branches only: confirm the schedule with `twin --seeds`.",
    ]


def branch_advice_dict(advice: BranchAdvice) -> dict[str, Any]:
    """Return plain values."""
    return {
        "run": advice.run.folder,
        "num_samples": advice.run.num_samples,
        "num_updates": advice.plan.num_updates,
        "run_updates": advice.run.num_updates,
        "replaces_decay": advice.run.noise_fell,
        "lr_rule": advice.lr_rule,
        "critical_batches": [{**asdict(one), "is_bound": one.is_bound} for one in advice.found],
        "phases": [asdict(phase) for phase in advice.plan.schedule.phases],
        "job_file": advice.job.model_dump(mode="json", exclude_none=True),
    }
