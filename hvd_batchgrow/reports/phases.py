"""Plan against actual: updates, samples, seconds and rank-hours of each phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hvd_batchgrow.reports import text
from hvd_batchgrow.reports.document import Column, Paragraph, Table, with_values
from hvd_batchgrow.reports.runs import ReportedRun
from hvd_batchgrow.results.account import account_of, phases_of_records
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
    of_phase, origin = phases_of_records(run.files), run.files.forked_from
    for done in account_of(run.files).phases:
        rows = np.flatnonzero(of_phase == done.index).tolist()
        phase, speed = run.phases[done.index], done.samples_per_s
        left = done.planned_samples - done.samples
        was_forked = origin is not None and phase["start_samples"] < origin.samples
        used = {**phase, **run.settings(rows[-1])} if was_forked and rows else phase
        yield {
            "run": run.label,
            "phase": done.index + 1,
            "start_epoch": phase["start_samples"] / run.files.plan["num_samples"],
            "lr": used["lr"],
            "momentum": finite(used.get("momentum")),
            "global_batch": phase["global_batch"],
            "layout": _layouts(run, phase, rows),
            "planned_updates": done.planned_updates,
            "updates": done.updates,
            "planned_samples": done.planned_samples,
            "samples": done.samples,
            "seconds": done.seconds,
            "rank_hours": done.rank_hours,
            "samples_per_s": speed,
            "seconds_left": left / speed if speed and left > 0 else None,
        }


def _layouts(run: ReportedRun, phase: Mapping[str, Any], rows: Sequence[int]) -> str:
    """Return the layouts of a phase that are on record, or else that of the plan, which is the last invocation's."""
    planned = [phase.get(key) for key in ("ranks", "accumulation", "micro_batch")]
    found = []
    for settings in map(run.settings, rows):
        recorded = [int(settings[key]) for key in ("ranks", "accumulation") if key in settings]
        if len(recorded) == 2 and recorded not in found:
            found.append(recorded)
    layouts = [_with_micro_batch(recorded, planned, phase["global_batch"]) for recorded in found] or [planned]
    return ", then ".join(" × ".join(text.clean(part, 20) for part in layout) for layout in layouts)


def _with_micro_batch(recorded: list[int], planned: list[Any], batch: int) -> list[Any]:
    """Return ranks, accumulation and micro-batch; records lack the last, which is unknown if the ranks are uneven."""
    if recorded == planned[:2]:
        return planned
    product = recorded[0] * recorded[1]
    return recorded if product < 1 or batch % product else [*recorded, batch // product]


def plan_notes(runs: Sequence[ReportedRun]) -> list[Paragraph]:
    """Return where forks begin, and the notes of the plans; equal ones once, with the names of their runs."""
    found: dict[str, list[str]] = {}
    for run in runs:
        notes = run.files.plan.get("notes")
        for note in notes if isinstance(notes, list) else ():
            found.setdefault(text.clean(note, 600), []).append(run.label)
    forked = [
        f"{run.label} continues {text.clean(origin.name, 80)} from sample {origin.samples:,}: before it, ε and m are "
        "those of the records."
        for run in runs
        if (origin := run.files.forked_from)
    ]
    noted = [f"Note of the plan of {', '.join(labels)}: {note}." for note, labels in found.items()]
    return [Paragraph(said) for said in [*forked, *noted]]
