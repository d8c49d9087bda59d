"""Plots of plans and advice against epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.advice import Advice, RecordedRun
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan

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
                batches = sorted({phase.global_batch for plan in plans for phase in plan.schedule.phases})
                axis.set_yticks(batches, [f"{batch:,}" for batch in batches])
                axis.minorticks_off()
        axes[0].legend()
        if title:
            axes[0].set_title(title, fontsize="small", wrap=True, parse_math=False)
        axes[-1].set_xlabel("epochs")


@contextmanager
def _picture(path: Path, num_panels: int, height: float) -> Iterator[Any]:
    """Yield axes stacked vertically, and save the figure after the `with` block."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(num_panels, 1, figsize=(7, height), sharex=True, squeeze=False, layout="constrained")
    try:
        yield axes[:, 0]
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be drawn: {error}") from None
    finally:
        plt.close(figure)


def _curve(plan: Plan, value: Callable[[Plan, Phase], float]) -> tuple[list[float], list[float]]:
    """Return the corners of the step function, with the start and the end of the warm-up."""
    schedule = plan.schedule
    epochs: list[float] = []
    values: list[float] = []
    for phase in schedule.phases:
        warm_up = [schedule.warmup.end_samples] if phase.start_samples < schedule.warmup.end_samples else []
        inside = [s for s in warm_up if s < phase.end_samples]
        for samples in (phase.start_samples, *inside, phase.end_samples - 1):
            if phase.num_updates:
                epochs.append(samples / plan.num_samples)
                values.append(value(plan, schedule.at(samples)))
    return epochs, values


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
