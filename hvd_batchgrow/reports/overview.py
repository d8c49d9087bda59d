"""The first sections of a report: the verdict, what could not be read, the runs, and how their jobs differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.reports import text
from hvd_batchgrow.reports.document import Column, Paragraph, Section, Table, with_values
from hvd_batchgrow.reports.runs import ReportedRun
from hvd_batchgrow.results.comparison import Comparison, compare_runs
from hvd_batchgrow.results.comparison_lines import arm_costs, branch_lines, curve_lines, statistics
from hvd_batchgrow.results.confounds import leaves
from hvd_batchgrow.results.run_cost import RunCost

_MOST_KEYS = 60


def compared(runs: Sequence[ReportedRun], margin: float | None) -> tuple[list[Comparison], str]:
    """Return the comparisons of the runs, or the reason why there is no comparison."""
    try:
        return compare_runs([run.files for run in runs], margin), ""
    except RunError as error:
        return [], str(error)


def verdict_section(comparisons: Sequence[Comparison], reason: str, faults: Sequence[str]) -> Section:
    """Return the verdict of each comparison, and what qualifies it; faults have their own section."""
    blocks: list[Paragraph | Table] = []
    for found in comparisons:
        names = f"{text.clean(found.first.name, 80)} and {text.clean(found.second.name, 80)}"
        blocks.append(Paragraph(text.clean(f"{names}: {found.verdict()}.", 1000), "verdict"))
        lines = [*branch_lines(found), *statistics(found), *curve_lines(found)]
        blocks += [Paragraph(text.clean(f"{line[0].upper()}{line[1:]}.", 1000)) for line in lines]
        blocks += [Paragraph(text.clean(f"Confounded: {line}.", 1000), "warning") for line in found.confounds]
        blocks += [Paragraph(text.clean(f"Note: {line}.", 1000)) for line in found.notes if line not in faults]
    if rows := [row for found in comparisons for row in _pair_rows(found)]:
        blocks += [_pair_table(rows), _arm_table([row for found in comparisons for row in _arm_rows(found)])]
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
            "only_first_right": pair.samples and pair.samples.only_first,
            "only_second_right": pair.samples and pair.samples.only_second,
            "mcnemar_p": pair.samples and pair.samples.p,
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
        Column("only_first_right", "only first right", text.integer, is_number=True),
        Column("only_second_right", "only second right", text.integer, is_number=True),
        Column("mcnemar_p", "McNemar's p", lambda value: f"{value:.2g}", is_number=True),
    )
    return Table("pairs", with_values(columns, rows), rows)


def _arm_rows(found: Comparison) -> Iterator[Mapping[str, Any]]:
    """Yield what a run of each arm has cost, as the mean over the pairs, and the ratios."""
    if not found.pairs:
        return
    names = ("updates", "samples", "seconds", "rank_hours")
    first, second = ({name: getattr(cost, name) for name in names} for cost in arm_costs(found))
    for arm, cost in ((found.first, first), (found.second, second)):
        yield {"arm": text.clean(arm.name, 80), "runs": len(found.pairs), **cost}
    yield {
        "arm": "second / first",
        **{key: _Ratio(second[key] / first[key]) for key in names if first[key] and second[key]},
    }


class _Ratio(float):
    """A quotient of two costs."""


def _arm_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    def show(usual: Callable[[Any], str]) -> Callable[[Any], str]:
        return lambda value: f"{value:.2f}×" if isinstance(value, _Ratio) else usual(value)

    columns = (
        Column("arm", "mean of a job's runs"),
        Column("runs", "runs", str, is_number=True),
        Column("updates", "updates", show(text.integer), is_number=True),
        Column("samples", "samples", show(text.integer), is_number=True),
        Column("seconds", "time", show(text.seconds), is_number=True),
        Column("rank_hours", "rank-hours", show(text.number), is_number=True),
    )
    return Table("arms", columns, rows)


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
        Column("branch_updates", "updates of branches", text.integer, is_number=True),
        Column("samples", "samples", text.integer, is_number=True),
        Column("epochs", "epochs", text.number, is_number=True),
        Column("seconds", "time", text.seconds, is_number=True),
        Column("rank_hours", "rank-hours", text.number, is_number=True),
        Column("cost", "cost of updates", text.number, is_number=True),
        Column("metric", "result"),
        Column("last", "last", _result, is_number=True),
        Column("best", "best", _result, is_number=True),
        Column("best_dataset", "best on"),
    ]
    notes = ["Time is that of the updates, without evaluations, checkpoints and start-up; rank-hours are that time in "
             "hours, times the ranks that each phase uses."]  # fmt: skip
    if price is not None:
        notes.append(
            f"Their cost is rank-hours times the price of {price:g} per rank-hour. The cost of whole invocations is "
            f"printed by hvd-batchgrow show RUN --price {price:g}."
        )
    rows = [_run_row(run, price) for run in runs]
    if any(row["branch_updates"] for row in rows):
        notes.append("Time, rank-hours and cost include the pauses in which a trigger trained branches.")
    return Section("Runs", (Table("runs", with_values(columns, rows), rows), Paragraph(" ".join(notes))))


def _run_row(run: ReportedRun, price: float | None) -> Mapping[str, Any]:
    summary, spent = run.summary, RunCost.of(run.files)
    rank_hours = spent.rank_hours
    what = "accuracy" if summary.metric == "top1" else text.clean(summary.metric, 40)
    return {
        "run": run.label,
        "state": text.clean(summary.state_text, 120),
        "policy": text.clean(summary.policy, 40),
        "seed": run.files.seed,
        "updates": summary.updates,
        "planned_updates": summary.num_updates,
        "branch_updates": spent.branch_updates or None,
        "samples": summary.samples,
        "epochs": summary.epoch,
        "seconds": spent.seconds,
        "rank_hours": rank_hours,
        "cost": None if price is None or rank_hours is None else price * rank_hours,
        "metric": f"{text.clean(summary.last_dataset, 20)} {what}" if summary.last_dataset else what,
        "last": None if summary.last_dataset is None else _Result(summary.metric, summary.last),
        "best": None if summary.best is None else _Result(summary.metric, summary.best),
        "best_dataset": None if summary.best is None else text.clean(summary.best_dataset, 20),
    }


class _Result(float):
    """A value of a metric; NaN: it is not finite."""

    metric: str

    def __new__(cls, metric: str, value: float | None) -> _Result:
        result = super().__new__(cls, math.nan if value is None else value)
        result.metric = metric
        return result


def _result(value: _Result) -> str:
    if math.isnan(value):
        return "not finite"
    return text.percent(float(value)) if value.metric == "top1" else text.number(float(value))


def difference_section(runs: Sequence[ReportedRun]) -> list[Section]:
    """Return the keys in which the jobs of the runs differ; no section for one run."""
    jobs = [dict(leaves(run.files.job)) for run in runs]
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
