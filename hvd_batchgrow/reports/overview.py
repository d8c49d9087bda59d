"""The first sections of a report: the verdict, what could not be read, the runs, and how their jobs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.reports import text
from hvd_batchgrow.reports.document import Column, Paragraph, Section, Table
from hvd_batchgrow.reports.runs import ReportedRun
from hvd_batchgrow.results.comparison import Comparison, compare_runs

_MOST_KEYS = 60


def compared(runs: Sequence[ReportedRun], margin: float | None) -> tuple[list[Comparison], str]:
    """Return the comparisons of the runs, or the reason why there are none."""
    try:
        return compare_runs([run.files for run in runs], margin), ""
    except RunError as error:
        return [], str(error)


def verdict_section(comparisons: Sequence[Comparison], reason: str) -> Section:
    """Return the verdict of each comparison, and what qualifies it."""
    blocks: list[Paragraph | Table] = []
    for found in comparisons:
        names = f"{text.clean(found.first.name, 80)} and {text.clean(found.second.name, 80)}"
        blocks.append(Paragraph(text.clean(f"{names}: {found.verdict()}.", 1000), "verdict"))
        blocks += [Paragraph(text.clean(f"Confounded: {line}.", 1000), "warning") for line in found.confounds]
        blocks += [Paragraph(text.clean(f"Note: {line}.", 1000)) for line in found.notes]
    if rows := [row for found in comparisons for row in _pair_rows(found)]:
        blocks.append(_pair_table(rows))
    if not comparisons:
        blocks.append(Paragraph(text.clean(f"No comparison: {reason}.", 1000), "verdict"))
    return Section("Verdict", tuple(blocks))


def _pair_rows(found: Comparison) -> Iterator[Mapping[str, Any]]:
    metric = "accuracy (%)" if found.metric == "top1" else text.clean(found.metric, 40)
    for pair in found.pairs:
        yield {
            "seed": pair.seed,
            "first": text.clean(pair.first_run.name, 80),
            "second": text.clean(pair.second_run.name, 80),
            "metric": f"{found.dataset} {metric}",
            "first_result": pair.first,
            "second_result": pair.second,
            "difference": pair.difference,
            "first_updates": pair.first_run.updates,
            "second_updates": pair.second_run.updates,
            "update_ratio": pair.second_run.updates / max(1, pair.first_run.updates),
        }


def _pair_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("seed", "seed", str, is_number=True),
        Column("first", "first run"),
        Column("second", "second run"),
        Column("metric", "result"),
        Column("first_result", "first", text.number, is_number=True),
        Column("second_result", "second", text.number, is_number=True),
        Column("difference", "first − second", lambda value: f"{value:+.4g}" if value else "0", is_number=True),
        Column("first_updates", "updates of first", text.integer, is_number=True),
        Column("second_updates", "of second", text.integer, is_number=True),
        Column("update_ratio", "second / first", lambda value: f"{value:.2f}×", is_number=True),
    )
    return Table("pairs", columns, rows)


def fault_section(faults: Sequence[str]) -> list[Section]:
    """Return what could not be read of the runs; no section if all could be read."""
    lines = tuple(Paragraph(text.clean(fault, 1000), "warning") for fault in dict.fromkeys(faults))
    return [Section("What could not be read", lines)] if lines else []


def runs_section(runs: Sequence[ReportedRun], price: float | None) -> Section:
    """Return one row per run."""
    columns = [
        Column("run", "run"),
        Column("state", "state"),
        Column("policy", "policy"),
        Column("seed", "seed", str, is_number=True),
        Column("updates", "updates", text.integer, is_number=True),
        Column("planned_updates", "planned", text.integer, is_number=True),
        Column("samples", "samples", text.integer, is_number=True),
        Column("epochs", "epochs", text.number, is_number=True),
        Column("seconds", "time", text.seconds, is_number=True),
        Column("rank_hours", "rank-hours", text.number, is_number=True),
        Column("cost", "cost", text.number, is_number=True),
        Column("metric", "result"),
        Column("last", "last", _result, is_number=True),
        Column("best", "best", _result, is_number=True),
    ]
    if price is None:
        columns = [column for column in columns if column.key != "cost"]
    notes = ["Time is that of the updates, without evaluations, checkpoints and start-up; rank-hours are that time in "
             "hours, times the ranks that each phase uses."]  # fmt: skip
    if price is not None:
        notes.append(f"Cost is rank-hours times the price of {price:g} per rank-hour.")
    rows = [_run_row(run, price) for run in runs]
    return Section("Runs", (Table("runs", tuple(columns), rows), Paragraph(" ".join(notes))))


def _run_row(run: ReportedRun, price: float | None) -> Mapping[str, Any]:
    summary, rank_hours = run.summary, float(run.window_rank_hours.sum())
    what = "accuracy" if summary.metric == "top1" else text.clean(summary.metric, 40)
    return {
        "run": run.label,
        "state": summary.state,
        "policy": text.clean(summary.policy, 40),
        "seed": run.files.seed,
        "updates": summary.updates,
        "planned_updates": summary.num_updates,
        "samples": summary.samples,
        "epochs": summary.epoch,
        "seconds": summary.training_s,
        "rank_hours": rank_hours,
        "cost": None if price is None else price * rank_hours,
        "metric": f"{text.clean(summary.last_dataset, 20)} {what}" if summary.last_dataset else what,
        "last": _Result(summary.metric, summary.last) if summary.last is not None else None,
        "best": _Result(summary.metric, summary.best) if summary.best is not None else None,
    }


class _Result(float):
    """A value of a metric."""

    metric: str

    def __new__(cls, metric: str, value: float) -> _Result:
        result = super().__new__(cls, value)
        result.metric = metric
        return result


def _result(value: _Result) -> str:
    return text.percent(float(value)) if value.metric == "top1" else text.number(float(value))


def difference_section(runs: Sequence[ReportedRun]) -> list[Section]:
    """Return the keys in which the jobs of the runs differ; no section for one run."""
    jobs = [dict(_leaves(run.files.job)) for run in runs]
    keys = sorted({key for job in jobs for key in job} - {"name"})
    found = [key for key in keys if len({repr(job.get(key)) for job in jobs}) > 1]
    if len(runs) < 2 or not found:
        return []
    columns = (Column("key", "key"), *(Column(f"run{k}", run.label) for k, run in enumerate(runs)))
    rows = [
        {"key": text.clean(key, 80), **{f"run{k}": _value(job.get(key)) for k, job in enumerate(jobs)}}
        for key in found[:_MOST_KEYS]
    ]
    blocks: list[Table | Paragraph] = [Table("job-differences", columns, rows)]
    if len(found) > _MOST_KEYS:
        blocks.append(Paragraph(f"{counted(len(found) - _MOST_KEYS, 'more key')} differ."))
    return [Section("How the jobs differ", tuple(blocks))]


def _value(value: Any) -> str | None:
    return None if value is None else text.clean(value, 80)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
