"""The end block: updates, samples and time of a run against its plan, and its cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hvd_batchgrow.messages.wording import counted, short_time
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.console_tables import number_table, print_table
from hvd_batchgrow.results.account import Account, PhaseDone, account_of
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import result_line, summarize


def print_end_block(console: PlainConsole, run: RunFiles, price: float | None = None) -> None:
    """Print a table of the phases, the results, the time by use and, with a price, the cost.

    Args:
        console: the console.
        run: the files of the run.
        price: price of one rank-hour; None: do not print the cost.
    """
    account, results = account_of(run), result_line(summarize(run))
    if any(phase.updates for phase in account.phases):
        print_table(console, phases_table(account.phases), ["rank-\nhours"])
    if results:
        console.paragraph(results)
    console.paragraph(_time_line(account))
    if price is not None:
        console.paragraph(_cost_line(account, price))


def phases_table(phases: Sequence[PhaseDone]) -> Table:
    """Return a table with one row per phase: done, and planned where it differs."""
    headings = ("phase", "batch", "updates", "samples", "time", "samples\nper s", "rank-\nhours")
    table = number_table(None, headings)
    for phase in phases:
        speed, hours = phase.samples_per_s, phase.rank_hours
        table.add_row(
            *(f"{phase.index + 1}", f"{phase.global_batch:,}"),
            *(_of(phase.updates, phase.planned_updates), _of(phase.samples, phase.planned_samples)),
            *(short_time(phase.seconds), "" if speed is None else f"{speed:,.0f}"),
            "" if hours is None else f"{hours:.3g}",
        )
    updates, samples, seconds = (
        sum(getattr(phase, name) for phase in phases) for name in ("updates", "samples", "seconds")
    )
    known = [phase.rank_hours for phase in phases if phase.rank_hours is not None]
    table.add_row(
        *("all", ""),
        _of(updates, sum(phase.planned_updates for phase in phases)),
        _of(samples, sum(phase.planned_samples for phase in phases)),
        *(short_time(seconds), f"{samples / seconds:,.0f}" if seconds else ""),
        f"{sum(known):.3g}" if len(known) == len(phases) else "",
        style="bold",
    )
    return table


def _of(done: int, planned: int) -> str:
    return f"{done:,}" if done == planned else f"{done:,} of {planned:,}"


def _time_line(account: Account) -> str:
    """Return the total time and its parts; a killed invocation may have no time on record."""
    where = counted(account.invocations, "invocation")
    if account.total_s is None:
        return f"time: {short_time(account.training_s)} of updates in {where}; the total is not on record"
    missing = f" ({account.untimed} of them not timed)" if account.untimed else ""
    total = f"time: {short_time(account.total_s)} in {where}{missing}"
    if account.other_s is None:
        return f"{total}; all updates on record: {short_time(account.training_s)}, some of them of other invocations"
    branches = {"branches": account.branches_s} if account.branches_s else {}
    parts = {"updates": account.training_s, "evaluation": account.evaluation_s, **branches, "other": account.other_s}
    split = ", ".join(f"{name} {short_time(seconds)}" for name, seconds in parts.items())
    return f"{total}: {split}"


def _cost_line(account: Account, price: float) -> str:
    """Return the cost in rank-hours and money; of the updates alone if the total time is not on record."""
    hours, what = account.rank_hours, "rank-hours"
    most = " at least" if account.untimed else ""
    if hours is None:
        hours, what = sum(phase.rank_hours or 0.0 for phase in account.phases), "rank-hours of updates"
    return f"cost:{most} {hours * price:,.2f} = {hours:.4g} {what} × {price:g} per rank-hour"
