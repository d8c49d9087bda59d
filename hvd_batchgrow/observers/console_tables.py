"""Plans and results as tables that never truncate a value."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

from rich import box
from rich.measure import Measurement
from rich.table import Table

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.wording import counted, metric_name, metric_value, result_text, short_time
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan

if TYPE_CHECKING:  # they import NumPy or torch, and `plan` needs neither
    from hvd_batchgrow.results.run_summary import RunSummary
    from hvd_batchgrow.schedule.cost.cost import Cost
    from hvd_batchgrow.schedule.cost.sensitivity import Variation
    from hvd_batchgrow.train.events import Evaluation, RunEnded
    from hvd_batchgrow.verification.audit import Audit
    from hvd_batchgrow.verification.verify import Compared


def number_table(title: str | None, headings: Sequence[str]) -> Table:
    """Return an empty table with narrow columns of numbers that never wrap."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def remove_column(table: Table, heading: str) -> None:
    """Remove a column from a table."""
    table.columns = [column for column in table.columns if column.header != heading]


def print_table(console: PlainConsole, table: Table, spare: Sequence[str] = ()) -> None:
    """Print a table. If it is too wide, drop spare columns and name them; if it is still too wide, print it in full.

    Args:
        console: the console.
        table: from `number_table`.
        spare: headings of the columns that may be dropped, the least important first.
    """
    unbounded = console.options.update(max_width=10_000)
    left, headings = list(spare), [column.header for column in table.columns]
    while (width := Measurement.get(console, unbounded, table).maximum) > console.width and left:
        remove_column(table, left.pop(0))
    table.width = width  # otherwise rich truncates values to the console's width
    console.print(table, crop=False)
    kept = [column.header for column in table.columns]
    if dropped := [" ".join(str(heading).split()) for heading in headings if heading not in kept]:
        console.paragraph(f"not shown at {console.width} columns: {', '.join(dropped)}")


def print_plan(console: PlainConsole, plan: Plan) -> None:
    """Print the phases of a plan."""
    is_constant = len({phase.momentum for phase in plan.schedule.phases}) == 1
    print_table(console, plan_table(plan), [*(["momentum"] if is_constant else []), "ghost\nbatches", "samples"])


def plan_table(plan: Plan) -> Table:
    """Return a table with one row per phase of a plan."""
    samples = f"N = {plan.num_samples:,}"
    if plan.num_validation:
        samples += f", validation samples: {plan.num_validation:,}"
    table = number_table(
        f"{plan.job.name}: {samples}, ghost batch {plan.ghost_batch}, ranks: {plan.peak_ranks}",
        (
            *("phase", "from\nepoch", "samples", "updates", "lr", "momentum", "batch", "requested\nbatch"),
            *("ranks ×\naccumulation ×\nmicro-batch", "ghost\nbatches", "noise\nscale"),
        ),
    )
    for index, (phase, layout) in enumerate(zip(plan.schedule.phases, plan.layouts, strict=True), start=1):
        cells = (
            f"{index}",
            f"{phase.start_epoch:g}",
            f"{phase.num_updates * phase.global_batch:,}",
            f"{phase.num_updates:,}",
            f"{phase.lr:.5g}",
            f"{phase.momentum:g}",
            f"{phase.global_batch:,}",
            _requested(phase),
            f"{layout.ranks} × {layout.accumulation} × {layout.micro_batch}{' uneven' * layout.uneven_ranks}",
            f"{phase.global_batch // plan.ghost_batch}",
            f"{plan.noise_scale(phase):.4g}",
        )
        table.add_row(*cells)
    if not any(map(_requested, plan.schedule.phases)):
        remove_column(table, "requested\nbatch")
    table.caption = f"{plan.num_updates:,} updates, {plan.schedule.end_samples:,} samples{_warmup_text(plan)}"
    table.caption_justify = "left"
    return table


def _requested(phase: Phase) -> str:
    """Return the requested batch, if the plan rounds it to another; otherwise an empty cell."""
    return "" if abs(phase.wanted_batch - phase.global_batch) < 0.5 else f"{phase.wanted_batch:,.0f}"


def _warmup_text(plan: Plan) -> str:
    warmup = plan.schedule.warmup
    if not warmup.end_samples:
        return ""
    return f"; the learning rate rises from {warmup.start_lr:g} over the first {warmup.end_samples:,} samples"


def cost_table(name: str, cost: Cost) -> Table:
    """Return a table of the cost of a plan, by phase and in total."""
    table = number_table(
        f"{name}: predicted, training alone",
        (
            *("phase", "ranks", "s per\nupdate", "waiting\nfor data", "time", "rank-hours"),
            "if the peak\nranks are held",
        ),
    )
    for index, phase in enumerate(cost.phases, start=1):
        row = (
            f"{index}",
            f"{phase.ranks}",
            f"{phase.update_s:.4f}",
            "–" if phase.data_wait_share is None else f"{phase.data_wait_share:.0%}",
            _time(phase.seconds),
            f"{phase.rank_hours:.3f}",
        )
        table.add_row(*row, "")
    totals = (f"{cost.peak_ranks} at most", "", "", _time(cost.seconds), f"{cost.chain_rank_hours:.3f}")
    table.add_row("all", *totals, f"{cost.held_rank_hours:.3f}", style="bold")
    return table


def sensitivity_table(name: str, variations: Sequence[Variation]) -> Table:
    """Return a table of the cost of a plan with each figure of the machine halved and doubled."""
    columns = ("figure", "factor", "time", "change", "rank-hours", "if the peak\nranks are held")
    table = number_table(f"{name}: if one figure were different", columns)
    table.columns[0].justify = "left"
    for change in variations:
        hours = (f"{change.chain_rank_hours:.3f}", f"{change.held_rank_hours:.3f}")
        percent = f"{100 * (change.time_ratio - 1):+.1f} %"
        table.add_row(change.figure, f"{change.factor:g}", _time(change.seconds), percent, *hours)
    return table


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def result_table(runs: Sequence[tuple[str, RunEnded]]) -> Table:
    """Return a table of runs, each under the name of its policy; the last run is the reference for the others."""
    evaluations = [run.evaluation for _, run in runs if run.evaluation]
    metric = next(iter(evaluations[0].metrics), "loss") if evaluations else "loss"
    heading = f"test\n{metric_name(metric)}"
    numbers = ("updates\n(planned = done)", "fewer\nupdates", heading, "wall time", "samples/s")
    table = number_table(None, ("schedule", *numbers))
    table.columns[0].justify = "left"
    reference = runs[-1][1]
    for policy, run in runs:
        same = "=" if run.num_updates == run.updates else "≠"
        table.add_row(
            policy,
            f"{run.num_updates:,} {same} {run.updates:,}",
            f"{reference.num_updates / run.num_updates:.2f}×",
            _result(run.evaluation, metric),
            f"{run.elapsed_s:.0f} s",
            f"{run.samples / run.elapsed_s:,.0f}",
        )
    return table


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """Return a table with one row per run."""
    headings = ("run", "state", "schedule", "epoch", "updates", "batch", "result", "best", "time", "twin")
    table = number_table(None, headings)
    for column in (*table.columns[:3], table.columns[-1]):
        column.justify = "left"
    for run in runs:
        result = "" if run.last_dataset is None else _of_set(result_text(run.metric, run.last), run.last_dataset)
        best = "" if run.best is None else _of_set(result_text(run.metric, run.best), run.best_dataset)
        table.add_row(
            *(run.folder.name, shorten(run.state_text, 48, placeholder="…"), run.policy),
            f"{run.epoch:.1f} / {run.epochs:.1f}",
            *(f"{run.updates:,} / {run.num_updates:,}", " → ".join(f"{end:,}" for end in _ends(run.batches))),
            *(result, best, short_time(run.training_s), run.twin or ""),
        )
    return table


def _ends(batches: Sequence[int]) -> list[int]:
    return list(dict.fromkeys([*batches[:1], *batches[-1:]]))


def _result(evaluation: Evaluation | None, metric: str) -> str:
    """Return the result on the test set, or on the validation set if the run stopped before its test."""
    if evaluation is None:
        return "none"
    value = evaluation.named()[metric]
    return _of_set(metric_value(metric, value), evaluation.dataset)


def _of_set(text: str, dataset: str) -> str:
    """Return a result with the name of its set, unless that is the test set."""
    return text if dataset == "test" else f"{text} ({dataset})"


def audit_table(result: Audit) -> Table:
    """Return a table of how often the samples of each epoch were used."""
    from hvd_batchgrow.verification.audit import replaced_samples

    consumed = result.consumed
    state = "passed" if result.passed else "FAILED"
    table = number_table(
        f"{consumed.run}: N = {consumed.num_samples:,}, seed {consumed.seed}: {state}",
        ("epoch", "samples", "used once", "not used", "used more\nthan once", "not on\nrecord"),
    )
    for epoch in result.epochs:
        cells = (epoch.epoch, epoch.num_reached, epoch.once, epoch.missing, epoch.repeated, epoch.unknown)
        table.add_row(*(f"{cell:,}" for cell in cells))
    if not consumed.gaps:
        remove_column(table, "not on\nrecord")
    num_updates = int(consumed.is_known.sum())
    lines = [f"{num_updates:,} updates, {len(result.wrong_updates):,} of which consumed other samples"]
    if result.wrong_updates:
        first = result.wrong_updates[0]
        start, stop = consumed.bounds[first : first + 2]
        lines.append(f"the first of them: update {first:,}, samples {start:,} to {stop:,}")
    for start, end in consumed.gaps:
        lines.append(f"samples {start:,} to {end:,} are not on record, as a resume noted: the audit cannot check them")
    if consumed.replaced:
        lines += [f"{len(consumed.replaced):,} bad samples were replaced", *replaced_samples(consumed, 5)]
    table.caption, table.caption_justify = "\n".join(lines), "left"
    return table


def print_verify(console: PlainConsole, job: Job, results: Sequence[Compared], num_updates: int) -> None:
    """Print how far the weights of each layout are from those of plain autograd, with a legend."""
    exact = job.layout.exact
    headings = ("ranks ×\naccumulation ×\nmicro-batch", "weights", "difference", "limit", "tensor", "")
    title = f"{job.name}: {counted(num_updates, 'update')}, {'exact' if exact else 'fast'} mode"
    table = number_table(title, headings)
    for column in table.columns[-2:]:
        column.justify = "left"
    for result in results:
        shape, worst = result.shape, result.deviation
        cells = (
            f"{shape.ranks} × {shape.accumulation} × {shape.micro_batch}",
            result.digest[:8],
            f"{worst.difference:.1e}",
            f"{worst.limit:.1e}",
            worst.tensor,
        )
        agrees = "bit-identical" if exact and result.is_identical else "agrees"
        table.add_row(*cells, agrees if result.passed else "DIFFERS")
    if not exact:
        remove_column(table, "weights")
    print_table(console, table, ["weights"])
    console.print(_VERIFY_LEGEND)


_VERIFY_LEGEND = """\
difference: |a - b| / |a| of the tensor that is closest to its limit, after the
first or the last update; a is the result of plain torch autograd.
limit: the effect of rounding on that tensor, measured on this network: plain
autograd repeated with slightly changed inputs, weights and gradients."""
