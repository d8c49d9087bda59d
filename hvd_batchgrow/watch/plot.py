"""A plan as a picture: learning rate, batch and noise scale against epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hvd_batchgrow.errors import RunError
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan

_PANELS: list[tuple[str, Callable[[Plan, Phase], float]]] = [
    ("learning rate", lambda plan, phase: phase.lr),
    ("batch", lambda plan, phase: phase.global_batch),
    ("noise scale", lambda plan, phase: plan.noise_scale(phase)),
]


def plot_plans(plans: Sequence[Plan], path: Path) -> None:
    """Draw plans over each other, as Smith et al. 2018 do in figure 1.

    Args:
        plans: drawn in order, the last in front.
        path: .png, .svg or .pdf.

    Raises:
        RunError: the file cannot be written, or its ending names no picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(_PANELS), 1, figsize=(7, 7), sharex=True, layout="constrained")
    styles = ("-", "--", ":")
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
    axes[-1].set_xlabel("epochs")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be drawn: {error}") from None
    finally:
        plt.close(figure)


def _curve(plan: Plan, value: Callable[[Plan, Phase], float]) -> tuple[list[float], list[float]]:
    """Corners of the staircase; the warm-up has its start and its end."""
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
