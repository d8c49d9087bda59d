"""Branches of a run as tables: what they would cost, and what they have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from hvd_batchgrow.messages.wording import short_time
from hvd_batchgrow.observers.console_tables import number_table
from hvd_batchgrow.results.branching import Branching, BranchResult, HeldOut


@dataclass(frozen=True)
class BranchCost:
    """What a branch will cost."""

    factor: int
    global_batch: int
    lr: float
    num_updates: int
    ranks: int
    seconds: float | None
    """Time of its updates, without start-up and evaluation; None: unknown."""
    is_done: bool
    """Whether it is trained already, and so costs nothing."""

    @property
    def rank_hours(self) -> float | None:
        """Rank-hours of its updates."""
        return None if self.seconds is None else self.seconds * self.ranks / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "rank_hours": self.rank_hours}


def branch_cost_table(costs: Sequence[BranchCost]) -> Table:
    """Return a table with one row per branch, and the sum of those that are not trained yet."""
    table = number_table("branches", ("k", "batch", "lr", "updates", "ranks", "time", "rank-hours"))
    for cost in costs:
        spent = ("trained", "") if cost.is_done else _spent(cost.seconds, cost.rank_hours)
        numbers = (f"{cost.factor}", f"{cost.global_batch:,}", f"{cost.lr:.4g}", f"{cost.num_updates:,}")
        table.add_row(*numbers, f"{cost.ranks}", *spent)
    left = [cost for cost in costs if not cost.is_done]
    sums = [_sum([cost.seconds for cost in left]), _sum([cost.rank_hours for cost in left])]
    table.add_row("", "", "", f"{sum(cost.num_updates for cost in left):,}", "", *_spent(*sums))
    return table


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _spent(seconds: float | None, rank_hours: float | None) -> tuple[str, str]:
    return ("unknown" if seconds is None else short_time(seconds), "" if rank_hours is None else f"{rank_hours:.3g}")


def branching_table(found: Branching) -> Table:
    """Return a table with one row per branch."""
    first = found.results[0]
    dataset = first.record.dataset
    losses = ("training\nloss", "difference", f"{dataset}\nloss", f"{dataset}\ndifference")
    saved = ("updates\nsaved", "time\nsaved", "not\nworse")
    table = number_table("branches", ("k", "batch", "lr", "updates", *losses, *saved))
    for result in found.results:
        record = result.record
        is_first = result is first
        numbers = (f"{record.factor}", f"{record.global_batch:,}", f"{record.lr:.4g}", f"{len(record.losses):,}")
        saved_s = first.record.seconds - record.seconds
        time_saved = "" if is_first or not math.isfinite(saved_s) else signed_time(saved_s)
        table.add_row(
            *numbers,
            _number(result.loss),
            "" if is_first else difference_text(result),
            _number(record.held_out),
            "" if is_first else held_out_text(result.held_out),
            "" if is_first else f"{len(first.record.losses) - len(record.losses):,}",
            time_saved,
            "" if is_first else "yes" if result.is_not_worse else "no",
        )
    return table


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def difference_text(result: BranchResult) -> str:
    """Return the difference of the training loss with its interval."""
    found = result.difference
    if found is None:
        return "not finite"
    return f"{found.mean:+.4f} ± {found.half_width:.4f}"


def held_out_text(found: HeldOut | None) -> str:
    """Return the difference on held-out samples, with its interval if it is known."""
    if found is None:
        return "not finite"
    return f"{found.mean:+.4f}" + ("" if found.half_width is None else f" ± {found.half_width:.4f}")


def signed_time(seconds: float) -> str:
    """Return a time that may be negative."""
    return ("-" if round(seconds) < 0 else "") + short_time(abs(seconds))
