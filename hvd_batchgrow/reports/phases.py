"""Plan against actual: updates, samples, seconds and rank-hours of each phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvd_batchgrow.reports import text
from hvd_batchgrow.reports.document import Column, Paragraph, Table, with_values
from hvd_batchgrow.reports.runs import ReportedRun
from hvd_batchgrow.results.account import account_of
from hvd_batchgrow.results.records import number as finite


def phase_table(runs: Sequence[ReportedRun]) -> Table:
    """Return one row per phase of each run."""
    columns = (
        Column("run", "run"),
        Column("phase", "phase", str, is_number=True),
        Column("start_epoch", "from epoch", text.number, is_number=True),
        Column("lr", "ε", text.number, is_number=True),
        Column("momentum", "m", text.number, is_number=True),
        Column("global_batch", "B", text.integer, is_number=True),
        Column("layout", "layout"),
        Column("planned_updates", "updates planned", text.integer, is_number=True),
        Column("updates", "done", text.integer, is_number=True),
        Column("planned_samples", "samples planned", text.integer, is_number=True),
        Column("samples", "done", text.integer, is_number=True),
        Column("seconds", "time", text.seconds, is_number=True),
        Column("rank_hours", "rank-hours", text.number, is_number=True),
        Column("samples_per_s", "samples/s", text.integer, is_number=True),
        Column("seconds_left", "time left", text.seconds, is_number=True),
    )
    rows = [row for run in runs for row in _rows(run)]
    return Table("phases", with_values(columns, rows), rows)


def _rows(run: ReportedRun) -> Iterator[Mapping[str, Any]]:
    """Yield the phases that have updates. The time left of a phase follows from its own speed so far."""
    for done in account_of(run.files).phases:
        phase, speed = run.phases[done.index], done.samples_per_s
        left = done.planned_samples - done.samples
        yield {
            "run": run.label,
            "phase": done.index + 1,
            "start_epoch": phase["start_samples"] / run.files.plan["num_samples"],
            "lr": phase["lr"],
            "momentum": finite(phase.get("momentum")),
            "global_batch": phase["global_batch"],
            "layout": " × ".join(text.clean(phase.get(key), 20) for key in ("ranks", "accumulation", "micro_batch")),
            "planned_updates": done.planned_updates,
            "updates": done.updates,
            "planned_samples": done.planned_samples,
            "samples": done.samples,
            "seconds": done.seconds,
            "rank_hours": done.rank_hours,
            "samples_per_s": speed,
            "seconds_left": left / speed if speed and left > 0 else None,
        }


def plan_notes(runs: Sequence[ReportedRun]) -> list[Paragraph]:
    """Return the notes of the plans; equal ones once, with the names of their runs."""
    found: dict[str, list[str]] = {}
    for run in runs:
        notes = run.files.plan.get("notes")
        for note in notes if isinstance(notes, list) else ():
            found.setdefault(text.clean(note, 600), []).append(run.label)
    return [Paragraph(f"Note of the plan of {', '.join(labels)}: {note}.") for note, labels in found.items()]
