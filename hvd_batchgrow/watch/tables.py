"""Plans and results as tables."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.events import RunEnded


def plan_table(plan: Plan) -> Table:
    """Phases of a plan, one a row."""
    layout = plan.layouts[0]
    table = Table(
        title=f"{plan.job.name}: N = {plan.num_samples:,}, ghost batch {plan.group}, {layout.ranks} ranks",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("phase", "from epoch", "from sample", "updates", "lr", "momentum", "global batch"):
        table.add_column(heading, justify="right")
    table.add_column("ranks × passes × micro-batch", justify="right")
    table.add_column("noise scale", justify="right")
    for index, (phase, layout) in enumerate(zip(plan.schedule.phases, plan.layouts, strict=True), start=1):
        cells = (
            f"{index}",
            f"{phase.start_epoch:g}",
            f"{phase.start_samples:,}",
            f"{phase.num_updates:,}",
            f"{phase.lr:.5g}",
            f"{phase.momentum:g}",
            f"{phase.global_batch:,}",
            f"{layout.ranks} × {layout.accumulation} × {layout.micro_batch}{' (ragged)' if layout.ragged else ''}",
            f"{plan.noise_scale(phase):.4g}",
        )
        table.add_row(*cells)
    table.caption = f"{plan.num_updates:,} updates, {plan.schedule.end_samples:,} samples"
    table.caption_justify = "left"
    return table


def plan_text(plan: Plan) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=120)
    console.print(plan_table(plan))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def result_table(runs: Sequence[tuple[str, RunEnded]]) -> Table:
    """Runs side by side, each under the name of its policy; the last is what the others are compared with."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("schedule")
    for heading in ("updates (planned = done)", "fewer updates", "test accuracy", "wall time", "samples/s"):
        table.add_column(heading, justify="right")
    reference = runs[-1][1]
    for policy, run in runs:
        same = "=" if run.num_updates == run.updates else "≠"
        table.add_row(
            policy,
            f"{run.num_updates:,} {same} {run.updates:,}",
            f"{reference.num_updates / run.num_updates:.2f}×",
            f"{100 * run.evaluation.top1:.2f} %" if run.evaluation else "none",
            f"{run.elapsed_s:.0f} s",
            f"{run.samples / run.elapsed_s:,.0f}",
        )
    return table
