"""Comparisons of runs as tables and lines of text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from hvd_batchgrow.messages.wording import metric_name, short_time
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.console_tables import number_table, print_table, remove_column
from hvd_batchgrow.results.comparison import Comparison, Pair
from hvd_batchgrow.results.comparison_lines import arm_costs, branch_lines, curve_lines, statistics

_SAMPLE_COLUMNS = ("only\nfirst right", "only\nsecond right", "McNemar's\np")


def print_comparison(console: PlainConsole, found: Comparison, *, with_costs: bool = True) -> None:
    """Print the results and costs of two arms, and the verdict at the end.

    Args:
        console: the console.
        found: the comparison.
        with_costs: whether to print the costs of both arms too.
    """
    console.print(f"first: {found.first.name}", soft_wrap=True)
    console.print(f"second: {found.second.name}", soft_wrap=True)
    if found.pairs:
        print_table(console, pair_table(found), _SAMPLE_COLUMNS[:2])
    if found.pairs and with_costs:
        print_table(console, arm_cost_table(found))
        for line in branch_lines(found):
            console.print(line, soft_wrap=True)
    for line in [*statistics(found), *curve_lines(found), *_cautions(found)]:
        console.print(line, soft_wrap=True)
    console.print(f"verdict: {found.verdict()}", soft_wrap=True)


def pair_table(found: Comparison) -> Table:
    """Return a table with one row per seed."""
    unit = f"\n({found.unit})" if found.unit else ""
    table = number_table(
        f"{found.dataset} {metric_name(found.metric)}",
        ("seed", "first", "second", f"difference{unit}", *_SAMPLE_COLUMNS),
    )
    for pair in found.pairs:
        results = (found.result(pair.first), found.result(pair.second))
        test = pair.samples
        counts = ("", "", "") if test is None else (f"{test.only_first:,}", f"{test.only_second:,}", f"{test.p:.2g}")
        table.add_row(f"{pair.seed}", *results, found.signed(pair.difference).removesuffix(" points"), *counts)
    if not any(pair.samples for pair in found.pairs):
        for heading in _SAMPLE_COLUMNS:
            remove_column(table, heading)
    return table


def arm_cost_table(found: Comparison) -> Table:
    """Return a table of the cost of a run, as the mean over the runs of each arm."""
    table = number_table(
        f"cost of a run, mean of {len(found.pairs)}", ("", "updates", "samples", "training\ntime", "rank-hours")
    )
    table.columns[0].justify = "left"
    costs = arm_costs(found)
    for name, cost in zip(("first", "second"), costs, strict=True):
        hours = "" if cost.rank_hours is None else f"{cost.rank_hours:.4g}"
        table.add_row(name, f"{cost.updates:,.0f}", f"{cost.samples:,.0f}", short_time(cost.seconds), hours)
    names = ("updates", "samples", "seconds", "rank_hours")
    ratios = [(getattr(costs[1], name), getattr(costs[0], name)) for name in names]
    table.add_row("second / first", *(f"{top / bottom:.2f}×" if top and bottom else "" for top, bottom in ratios))
    return table


def _cautions(found: Comparison) -> list[str]:
    return [*(f"confounded: {text}" for text in found.confounds), *(f"note: {text}" for text in found.notes)]


def comparison_tree(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values."""
    curves = found.curves
    return {
        "first": found.first.name,
        "second": found.second.name,
        "metric": found.metric,
        "dataset": found.dataset,
        "unit": found.unit,
        "margin": found.margin,
        "pairs": [_pair_tree(pair) for pair in found.pairs],
        "difference": asdict(found.difference) if found.difference else None,
        "equivalence": asdict(found.equivalence) if found.equivalence else None,
        "costs": [asdict(cost) for cost in arm_costs(found)] if found.pairs else None,
        "curves": asdict(curves) | {"mean": curves.mean, "largest": curves.largest} if curves else None,
        "confounds": found.confounds,
        "notes": found.notes,
        "verdict": found.verdict(),
    }


def _pair_tree(pair: Pair) -> dict[str, Any]:
    runs = {"first_run": str(pair.first_run.folder), "second_run": str(pair.second_run.folder)}
    results = {"first": pair.first, "second": pair.second, "difference": pair.difference}
    return {"seed": pair.seed, **runs, **results, "mcnemar": asdict(pair.samples) if pair.samples else None}
