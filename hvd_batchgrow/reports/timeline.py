"""What happened in the runs, in order: invocations, transitions, decisions, gaps in the record, the end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hvd_batchgrow.reports import text
from hvd_batchgrow.reports.document import Column, Table
from hvd_batchgrow.reports.order_record import OrderRecord
from hvd_batchgrow.reports.runs import ReportedRun
from hvd_batchgrow.results.records import number as finite


@dataclass(frozen=True)
class _Event:
    samples: float | None
    """Sample counter; None: not on record."""
    kind: str
    detail: str
    time: str = ""


def event_table(runs: Sequence[ReportedRun], orders: Sequence[OrderRecord]) -> Table:
    """Return the events of the runs, one run after the other."""
    columns = (
        Column("run", "run"),
        Column("samples", "sample", text.integer, is_number=True),
        Column("epoch", "epoch", text.number, is_number=True),
        Column("updates", "update", text.integer, is_number=True),
        Column("time", "time"),
        Column("event", "event"),
        Column("detail", "detail"),
    )
    rows = [_row(run, event) for run, order in zip(runs, orders, strict=True) for event in _events(run, order)]
    return Table("events", columns, rows)


def _row(run: ReportedRun, event: _Event) -> Mapping[str, Any]:
    row = {"run": run.label, "time": event.time, "event": event.kind, "detail": text.clean(event.detail, 600)}
    if event.samples is None:
        return row
    updates = float(run.updates_at(np.array([event.samples]))[0])
    at = {"samples": event.samples, "epoch": event.samples / run.files.plan["num_samples"]}
    return row | at | ({"updates": round(updates)} if np.isfinite(updates) else {})


def _events(run: ReportedRun, order: OrderRecord) -> list[_Event]:
    """Return the events of a run by sample counter; an invocation without one follows those before it."""
    found = [*_transitions(run), *_decisions(run), *_skipped(run), *_gaps(order)]
    last = 0.0
    keyed: list[tuple[float, int, _Event]] = []
    for event in _invocations(run):
        last = max(last, event.samples or 0.0)
        keyed.append((last, 0, event))
    keyed += [(event.samples or 0.0, -1, event) for event in _forked(run)]
    keyed += [(event.samples or 0.0, 1, event) for event in found]
    keyed.append((float("inf"), 2, _end(run)))
    return [event for *_, event in sorted(keyed, key=lambda entry: entry[:2])]


def _invocations(run: ReportedRun) -> Iterator[_Event]:
    for k, attempt in enumerate(run.files.attempts):
        samples = finite(attempt.get("start_samples", None if k else 0))
        hardware = attempt.get("hardware")
        device = hardware.get("device") if isinstance(hardware, dict) else None
        ranks = f"{attempt.get('ranks')} ranks" if attempt.get("ranks") != 1 else "1 rank"
        parts = [ranks, attempt.get("backend"), attempt.get("host"), device]
        detail = ", ".join(text.clean(part, 120) for part in parts if part)
        kind = f"resumed, invocation {k + 1}" if k and samples != 0 else "started" if not k else "started again"
        yield _Event(samples, kind, detail, _time(attempt.get("started")))


def _time(started: Any) -> str:
    """Return `2026-11-29 04:36:38 +0000`, without its letter T."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T([\d:]{8})", r"\1 \2 ", text.clean(started or "", 40))


def _forked(run: ReportedRun) -> Iterator[_Event]:
    if origin := run.files.forked_from:
        yield _Event(origin.samples, "forked", f"continues {origin.name}; {origin.changes() or 'the same job'}")


def _transitions(run: ReportedRun) -> Iterator[_Event]:
    decided = {line["samples"] for line in run.files.decisions}
    for samples, changes in _changes_by_sample(run).items():
        if changes and samples <= run.files.samples and samples not in decided:
            yield _Event(samples, "transition", changes)


def _changes_by_sample(run: ReportedRun) -> dict[int, str]:
    """Return what changes at the start of each phase after the first.

    Up to the checkpoint of a fork, the phases are those of the records, since they had another plan.
    """
    phases = [phase for phase in run.phases if phase["num_updates"] and not phase.get("continues_phase")]
    found = _recorded_changes(run, run.files.forked_from.samples) if run.files.forked_from else {}
    starts = run.files.column("samples") - run.files.record_samples
    for before, phase in pairwise(phases):
        samples = phase["start_samples"]
        if run.files.forked_from is None or samples > run.files.forked_from.samples:
            row = int(np.searchsorted(starts, samples))
            found[samples] = _changes({**before, **_layout(run, row - 1)}, {**phase, **_layout(run, row)})
    return found


def _layout(run: ReportedRun, row: int) -> dict[str, float]:
    """Return ranks and accumulation of a training record: those of the plan are the last invocation's."""
    return {key: value for key, value in run.settings(row).items() if key in {"ranks", "accumulation"}}


def _recorded_changes(run: ReportedRun, last: int) -> dict[int, str]:
    """Return what changes between training records of different phases, up to a sample counter and at it."""
    continued = {phase["start_samples"] for phase in run.phases if phase.get("continues_phase")}
    ends, phase = run.files.column("samples"), run.files.column("phase")
    rows = np.flatnonzero((np.diff(phase) != 0) | (ends[:-1] == last))
    return {
        int(ends[row]): _changes(run.settings(row), run.settings(row + 1))
        for row in rows.tolist()
        if ends[row] <= last and ends[row] not in continued
    }


def _changes(before: Mapping[str, Any], phase: Mapping[str, Any]) -> str:
    """Return what a transition changes."""
    shown = (("global_batch", "B", text.integer), ("lr", "ε", text.number), ("momentum", "m", text.number),
             ("ranks", "ranks", text.integer), ("accumulation", "passes", text.integer))  # fmt: skip
    pairs = [(name, show(before.get(key)), show(phase.get(key))) for key, name, show in shown]
    return ", ".join(f"{name} {old} → {new}" for name, old, new in pairs if old != new)


def _decisions(run: ReportedRun) -> Iterator[_Event]:
    planned = _changes_by_sample(run)
    for line in run.files.decisions:
        # The rates of a decision are those before lr_boundaries_epochs; those of the plan are the ones that are used.
        changes = [planned.get(line["samples"]) or _decided_changes(line)]
        measured = line.get("measured")
        if isinstance(measured, dict):
            changes += [f"{text.clean(name, 40)} = {text.number(value)}" for name, value in measured.items()]
        restored = finite(line.get("restore_samples"))
        changes += [] if restored is None else [f"weights as at sample {restored:,.0f}"]
        why = text.clean(line.get("why", ""), 300)
        kind = f"decision of {text.clean(line.get('trigger', 'the trigger'), 40)}"
        yield _Event(line["samples"], kind, "; ".join(filter(None, (why, ", ".join(filter(None, changes))))))


def _decided_changes(line: Mapping[str, Any]) -> str:
    """Return what a decision changes that no phase of the plan begins with."""
    pairs = [
        (name, text.number(line.get(f"old_{key}")), text.number(line.get(f"new_{key}")))
        for name, key in (("B", "batch"), ("ε", "lr"))
    ]
    return ", ".join(f"{name} {old} → {new}" for name, old, new in pairs if old != new)


def _skipped(run: ReportedRun) -> Iterator[_Event]:
    """Yield the records in which updates were skipped because they were not finite."""
    skipped = np.nan_to_num(run.files.column("skipped"))
    for k in np.flatnonzero(np.diff(skipped, prepend=0.0) > 0):
        number = int(skipped[k] - (skipped[k - 1] if k else 0))
        detail = f"{number} {'update' if number == 1 else 'updates'} skipped: not finite"
        yield _Event(float(run.files.column("samples")[k]), "skipped", detail)


def _gaps(order: OrderRecord) -> Iterator[_Event]:
    for start, end in order.gaps:
        yield _Event(float(start), "gap in the record", f"the updates up to sample {end:,} are not on record")


def _end(run: ReportedRun) -> _Event:
    summary = run.summary
    if summary.state == "finished":
        return _Event(summary.samples, "finished", f"{summary.updates:,} of {summary.num_updates:,} updates")
    percent = 100 * summary.samples / summary.end_samples
    by = f", by {text.clean(summary.host, 80)}" if summary.host else ""
    error = f": {text.clean(summary.error, 300)}" if summary.error else ""
    return _Event(summary.samples, f"{summary.state}{by}", f"at {percent:.1f} % of the plan{error}")
