"""Advice as a table, as a commented job file, and as plain values."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import tomli_w
from rich.table import Table

from hvd_batchgrow.config import Job
from hvd_batchgrow.observers.console_tables import number_table
from hvd_batchgrow.schedule.adaptive.noise_record import Observation, typical
from hvd_batchgrow.schedule.advice import Advice, AdvisedPhase
from hvd_batchgrow.schedule.recorded_run import RecordedRun

_ROWS = 12
"""Number of segments of equal length in the table of a run; a segment in which the batch changes is split."""

_NO_BAND = "no band yet"
"""Shown for a segment whose B_simple comes from too few updates for a confidence interval."""


def evidence_table(run: RecordedRun, advice: Advice | None = None) -> Table:
    """Return a table of B_simple and its band over the run, next to the run's batch and the advised one.

    Args:
        run: the run with its record.
        advice: the advice; None: show no advised batch.
    """
    table = number_table(
        f"{run.folder}: N = {run.num_samples:,}; medians over segments of the run",
        ("epochs", "updates", "batch", "lr", "B_simple", "band of 95 %", "resolved", "advised\nbatch"),
    )
    for segment in _segments(run.seen):
        first, last = segment[0], segment[-1]
        b_simple = typical(segment, lambda o: o.b_simple, 0.5)
        band = _band(b_simple, typical(segment, lambda o: o.low, 0.5), typical(segment, lambda o: o.high, 0.5))
        resolved = sum(o.length for o in segment if o.is_resolved) / sum(o.length for o in segment)
        table.add_row(
            f"{first.start_samples / run.num_samples:.2f} - {last.samples / run.num_samples:.2f}",
            f"{sum(o.updates for o in segment):,}",
            f"{first.global_batch:,}",
            f"{last.lr:.4g}",
            _number(b_simple),
            band,
            "-" if band == _NO_BAND else f"{100 * resolved:.0f} %",
            _advised_batches(advice, first.start_samples, last.samples),
        )
    return table


def _segments(seen: Sequence[Observation]) -> list[list[Observation]]:
    """Split the records into segments of nearly equal length, each with a single batch."""
    end, groups, key = max((o.samples for o in seen), default=0), [], None
    for o in seen:
        here = (o.start_samples * _ROWS // end, o.global_batch)
        if here != key:
            groups.append([o])
        else:
            groups[-1].append(o)
        key = here
    return groups


def _advised_batches(advice: Advice | None, start: int, end: int) -> str:
    phases = [p.phase for p in advice.phases] if advice else []
    return " → ".join(f"{p.global_batch:,}" for p in phases if p.start_samples < end and p.end_samples > start) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _band(b_simple: float | None, low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "unresolved" if b_simple is None else _NO_BAND
    end = "∞" if high is None else _number(high)
    return f"{_number(low)} … {end}"


def advised_job_file(advice: Advice) -> str:
    """Return the advised job as TOML. Its comments name the source, the cost, and where the evidence is weak."""
    return commented_job_file(_head(advice), advice.job)


def commented_job_file(head: Sequence[str], job: Job) -> str:
    """Return a job as TOML, after lines of comments, which are wrapped."""
    folded = [part for line in head for part in textwrap.wrap(line, 116, subsequent_indent="  ") or [""]]
    comments = "".join(f"# {line}".rstrip() + "\n" for line in folded)
    return f"{comments}\n{tomli_w.dumps(job.model_dump(mode='json', exclude_none=True))}"


def _head(advice: Advice) -> list[str]:
    run = advice.run
    headroom = "" if advice.headroom == 1 else f", divided by h = {advice.headroom:g}"
    adam = " B_simple is of the gradient as Adam scales it." if run.job.gradient_noise.preconditioned else ""
    lines = [
        f"Advice from {' '.join(run.folder.split())}: the growth that its gradient noise supports.",
        f"Batches stay within the lower end of B_simple's band of 95 %{headroom}: more wastes samples.{adam}",
        "",
        *summary(advice),
        "",
        "   from epoch   batch         lr   updates   B_simple (band)            efficiency",
        *(_phase_line(phase) for phase in advice.phases),
        "",
    ]
    if advice.weak:
        return [*lines, "Weak evidence:", *(f"- {' '.join(text.split())}" for text in advice.weak)]
    return [*lines, "No part of the run has weak evidence."]


def summary(advice: Advice) -> list[str]:
    """Return sentences on the number of updates, the learning rate and the noise scale."""
    updates = against_run(advice.plan.num_updates, advice.run.num_updates)
    first, last = advice.plan.schedule.phases[0], advice.plan.schedule.phases[-1]
    fall = advice.plan.noise_scale(first) / advice.plan.noise_scale(last)
    rise = advice.run.rise_epoch
    kept = "kept its noise scale constant" if rise is None else f"raised its noise scale at epoch {rise:g}"
    if advice.replaces_decay:
        noise = in_place_of_decay(advice.run, "as far as the evidence supports")
    elif fall > 1 + 1e-9:
        rule = "adam" if advice.job.optim.averages_gradients else "linear"
        noise = (
            f"The run {kept}. Here it falls by {fall:.3g} as the batch grows, as if lr were "
            f"divided by as much; to keep it constant: --lr-rule {rule}."
        )
    else:
        noise = f"The run {kept}; this job keeps it constant: lr rises with the batch, above the run's lr."
    return [f"{updates}{_price(advice)}", noise]


def in_place_of_decay(run: RecordedRun, how_far: str) -> str:
    """Return a sentence on the noise scale of a job that grows where that of its run fell."""
    growth = f"where it fell, the batch grows {how_far}, and lr decays by the remaining factor"
    if run.rise_epoch is None:
        return f"The noise scale equals the run's at every epoch: {growth}."
    rise = f"At epoch {run.rise_epoch:g} it rose, which this job does not repeat: it stays at the lowest value before"
    return f"The noise scale follows the run's: {growth}. {rise}."


def against_run(ours: int, runs: int) -> str:
    """Return a sentence that compares the number of updates of an advised job with that of its run."""
    ratio = f"{runs / ours:.2f}× fewer" if ours <= runs else f"{ours / runs:.2f}× more"
    return f"{ours:,} updates against the run's {runs:,}: {ratio}."


def _price(advice: Advice) -> str:
    """Return a sentence on the mean worth of a sample over the phases in which it is known."""
    known = [(p.phase.end_samples - p.phase.start_samples, p.efficiency) for p in advice.phases if p.efficiency]
    if not known:
        return ""
    worth = sum(length * efficiency for length, efficiency in known) / sum(length for length, _ in known)
    return f" A sample is worth {worth:.2f} of the run's, each batch at its best lr."


def _phase_line(advised: AdvisedPhase) -> str:
    phase = advised.phase
    seen = (
        f"{_number(advised.b_simple)} ({_band(advised.b_simple, advised.low, advised.high)})"
        if advised.b_simple
        else "no record"
    )
    worth = "unknown" if advised.efficiency is None else f"{advised.efficiency:.2f}"
    epoch, lr = f"{phase.start_epoch:.2f}", f"{phase.lr:.4g}"
    return f"   {epoch:>10} {phase.global_batch:>7,} {lr:>10} {phase.num_updates:>9,}   {seen:<26} {worth}"


def advice_dict(advice: Advice) -> dict[str, Any]:
    """Return advice as plain values, as `advise --json` prints them."""
    phases = [
        {**asdict(p.phase), "b_simple": p.b_simple, "low": p.low, "high": p.high, "efficiency": p.efficiency}
        for p in advice.phases
    ]
    return {
        "run": advice.run.folder,
        "num_samples": advice.run.num_samples,
        "num_updates": advice.plan.num_updates,
        "run_updates": advice.run.num_updates,
        "replaces_decay": advice.replaces_decay,
        "phases": phases,
        "weak": list(advice.weak),
        "seen": [asdict(o) for o in advice.run.seen],
        "job_file": advice.job.model_dump(mode="json", exclude_none=True),
    }
