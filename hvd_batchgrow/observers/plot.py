"""Plots of plans and advice against epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.advice import Advice
from hvd_batchgrow.schedule.phases import Phase, Schedule
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.schedule.recorded_run import RecordedRun

_WARMUP_POINTS = 200
"""Points of a warm-up that are drawn, about."""
_LEGEND_LETTERS = 60
"""Letters of the names in one row of the legend."""
_PANELS: list[tuple[str, Callable[[Plan, Phase], float]]] = [
    ("learning rate", lambda plan, phase: phase.lr),
    ("batch", lambda plan, phase: phase.global_batch),
    ("noise scale", lambda plan, phase: plan.noise_scale(phase)),
]


def plot_plans(plans: Sequence[Plan], path: Path, title: str | None = None) -> None:
    """Plot plans in the same axes, as in figure 1 of Smith et al. 2018.

    Args:
        plans: drawn in order, the last in front.
        path: .png, .svg or .pdf.
        title: a sentence above the plot; None: no title.

    Raises:
        RunError: the file cannot be written, or its suffix is not an image format.
    """
    styles = ("-", "--", ":")
    with _picture(path, len(_PANELS), 7) as axes:
        for (label, value), axis in zip(_PANELS, axes, strict=True):
            for index, plan in enumerate(plans):
                epochs, values = _curve(plan, value)
                axis.plot(epochs, values, styles[index % 3], label=plan.job.name, linewidth=2)
            axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if label == "batch":
                batches = _batch_ticks({phase.global_batch for plan in plans for phase in plan.schedule.phases})
                axis.set_yticks(batches, [f"{batch:,}" for batch in batches])
                axis.minorticks_off()
        columns = len(plans) if sum(len(plan.job.name) for plan in plans) <= _LEGEND_LETTERS else 1
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
        if title:
            axes[0].set_title(title, fontsize="small", wrap=True, parse_math=False)
        axes[-1].set_xlabel("epochs")


@contextmanager
def _picture(path: Path, num_panels: int, height: float) -> Iterator[Any]:
    """Yield axes stacked vertically, and save the figure after the `with` block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    yield figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be drawn: {error}") from None


def _batch_ticks(batches: Iterable[int]) -> list[int]:
    """Return the batches to label on a log axis: the smallest, the largest, and those that leave room between labels.

    A panel has room for about 10 labels.
    """
    ascending = sorted(set(batches))
    smallest, largest = ascending[0], ascending[-1]
    room = math.log(largest / smallest) / 9
    ticks = [smallest]
    for batch in ascending[1:-1]:
        if min(math.log(batch / ticks[-1]), math.log(largest / batch)) >= room:
            ticks.append(batch)
    return ticks if smallest == largest else [*ticks, largest]


def _curve(plan: Plan, value: Callable[[Plan, Phase], float]) -> tuple[list[float], list[float]]:
    """Return the corners of the step function, and points of the warm-up, which is curved on a log axis.

    A rate of 0 at the start of the warm-up is below any log axis: the line leaves the plot there.
    """
    schedule = plan.schedule
    epochs: list[float] = []
    values: list[float] = []
    for phase in filter(lambda phase: phase.num_updates, schedule.phases):
        rising = _warmup_updates(schedule, phase)
        count = math.ceil(_WARMUP_POINTS * rising * phase.global_batch / max(1, schedule.warmup.end_samples))
        points = {0} | {rising * k // count for k in range(1, count + 1)}
        starts = [phase.start_samples + k * phase.global_batch for k in sorted(points) if k < phase.num_updates]
        for samples in (*starts, phase.end_samples - 1):
            epochs.append(samples / plan.num_samples)
            values.append(value(plan, schedule.at(samples)))
    return epochs, values


def _warmup_updates(schedule: Schedule, phase: Phase) -> int:
    """Return how many updates of a phase are in the warm-up."""
    left = schedule.warmup.end_samples - schedule.progress_at(phase.start_samples)
    return min(phase.num_updates, max(0, math.ceil(left / (phase.progress_rate * phase.global_batch))))


def plot_evidence(run: RecordedRun, path: Path, advice: Advice | None = None) -> None:
    """Plot B_simple with its band, the run's batch and the advised one against epochs.

    Args:
        run: the run with its record.
        path: .png, .svg or .pdf.
        advice: the advice; None: plot no advised batch.

    Raises:
        RunError: as `plot_plans`.
    """
    advised = [p.phase for p in advice.phases] if advice else []
    nan = float("nan")  # draws a gap where B_simple is unresolved
    epochs = [o.samples / run.num_samples for o in run.seen]
    resolved = [o.b_simple or nan for o in run.seen]
    lows = [o.low if o.low else nan for o in run.seen]
    # A band without an upper end extends to the top of the plot: ten times its largest value.
    top = 10 * max([phase.global_batch for phase in advised] + [o.high or o.b_simple or 0 for o in run.seen])
    highs = [(o.high or top) if o.is_resolved else nan for o in run.seen]
    with _picture(path, 1, 4) as (axis,):
        axis.fill_between(epochs, lows, highs, alpha=0.25, color="tab:blue", linewidth=0, label="band of 95 %")
        axis.plot(epochs, resolved, color="tab:blue", label="B_simple")
        steps = [(o.start_samples, o.samples, o.global_batch) for o in run.seen]
        axis.plot(*_staircase(steps, run.num_samples), ":", color="black", label="batch of the run")
        steps = [(phase.start_samples, phase.end_samples, phase.global_batch) for phase in advised]
        if steps:
            axis.plot(*_staircase(steps, run.num_samples), color="tab:orange", linewidth=2, label="advised batch")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_title(run.job.name)
        axis.set_xlabel("epochs")
        axis.set_ylabel("samples")
        axis.grid(alpha=0.3)
        axis.legend()


def _staircase(steps: Sequence[tuple[int, int, int]], num_samples: int) -> tuple[list[float], list[int]]:
    """Return the corners of a step function given as (start, end, batch)."""
    return (
        [samples / num_samples for start, end, _ in steps for samples in (start, end)],
        [batch for *_, batch in steps for _ in range(2)],
    )
