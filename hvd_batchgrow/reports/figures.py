"""The figures of a report, from the records of its runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from zlib import crc32

import numpy as np

from hvd_batchgrow.reports.curves import Points, difference, steps, thin, thin_band
from hvd_batchgrow.reports.document import Curve, Figure, FigureRow, Style
from hvd_batchgrow.reports.runs import BATCH_DASH, Clock, ReportedRun
from hvd_batchgrow.reports.text import metric_label
from hvd_batchgrow.results.run_summary import training_dataset

_LOG_RATIO = 8.0
"""Ratio of the largest to the smallest value of a loss from which its axis is logarithmic."""


def figure(name: str, title: str, labels: tuple[str, str], curves: Sequence[Curve], *, is_log: bool = False) -> Figure:
    """Return a figure of the curves that have points; its axis is linear if a value is not above 0."""
    if not re.fullmatch(r"[a-z0-9-]{1,60}", name):  # it has the name of a user's metric
        name = f"{re.sub('[^a-z0-9]+', '-', name.lower())[:40]}-{crc32(name.encode(errors='replace')):08x}"
    drawn = tuple(curve for curve in curves if np.isfinite(curve.points.y).any())
    positive = all(np.nanmin(curve.points.y) > 0 for curve in drawn)
    return Figure(name, title, *labels, drawn, bool(is_log and positive))


def row(figures: Sequence[Figure]) -> list[FigureRow]:
    """Return the figures that have curves as one row; nothing without such a figure."""
    drawn = tuple(figure for figure in figures if figure.curves)
    return [FigureRow(drawn)] if drawn else []


def schedule_figures(runs: Sequence[ReportedRun], clock: Clock) -> list[FigureRow]:
    """Return learning rate and batch by epoch, as in figure 1 of Smith et al. 2018."""
    rates = [_step_curve(run, "lr", clock) for run in runs]
    batches = [_step_curve(run, "global_batch", clock) for run in runs]
    return row(
        [
            figure("learning-rate", "Learning rate ε", (clock.label, "ε"), rates, is_log=True),
            figure("batch", "Global batch B", (clock.label, "samples"), batches, is_log=True),
        ]
    )


def noise_figures(runs: Sequence[ReportedRun], clock: Clock) -> list[FigureRow]:
    """Return the scheduled noise scale, and the measured gradient noise scale beside the batch if it was measured."""
    scheduled = [_step_curve(run, "noise_scale", clock) for run in runs]
    figures = [figure("noise-scale", "Noise scale g, scheduled", (clock.label, "g"), scheduled, is_log=True)]
    measured = [run for run in runs if np.isfinite(run.files.column("gradient_noise.all.b_simple")).any()]
    curves = [_noise_curve(run, clock) for run in measured]
    curves += [_step_curve(run, "global_batch", clock, f"batch of {run.label}", BATCH_DASH) for run in measured]
    title = "Gradient noise scale B_simple, measured, with its 95 % band"
    return row([*figures, figure("gradient-noise", title, (clock.label, "samples"), curves, is_log=True)])


def _step_curve(run: ReportedRun, column: str, clock: Clock, label: str = "", dash: int | None = None) -> Curve:
    """Return a column as a step function: a record has the value of all its updates."""
    ends = run.files.column("samples")
    values = run.files.column(column)
    points = steps(clock.at(ends - run.files.record_samples), clock.at(ends), values)
    style = run.style if dash is None else Style(run.style.color, dash)
    return Curve(label or run.label, points, style, is_steps=True)


def _noise_curve(run: ReportedRun, clock: Clock) -> Curve:
    b_simple, low, high = (run.files.column(f"gradient_noise.all.{end}") for end in ("b_simple", "low", "high"))
    known = np.isfinite(b_simple) & (b_simple > 0)
    has_band = known & np.isfinite(low) & (low > 0)
    # A band without an upper end extends to the top of the plot: ten times the largest value.
    top = 10 * max(values[np.isfinite(values)].max(initial=0.0) for values in (b_simple, high))
    high = np.where(np.isfinite(high), high, top)
    ends = (np.where(known, b_simple, np.nan), np.where(has_band, low, np.nan), np.where(has_band, high, np.nan))
    return Curve(run.label, thin_band(Points(clock.at(run.files.column("samples")), *ends)), run.style)


def curve_figures(runs: Sequence[ReportedRun], clock: Clock) -> list[FigureRow]:
    """Return training and evaluation curves, by epoch and by updates, as in figures 2 to 4 of Smith et al. 2018."""
    names = list(dict.fromkeys(["loss", *(run.summary.metric for run in runs)]))
    rows = [row(_by_both("train", name, [train_curve(run, name) for run in runs], clock)) for name in names]
    for dataset in ("validation", "test"):
        for name in names:
            rows.append(row(evaluation_figures(runs, name, dataset, clock)))
    return [found for some in rows for found in some]


def evaluation_figures(
    runs: Sequence[ReportedRun], name: str, dataset: str, clock: Clock, prefix: str = ""
) -> list[Figure]:
    """Return the results on a set by epoch and by updates. A set that no run evaluated twice has no figure."""
    found = [(run, *run.evaluated(name, dataset)) for run in runs]
    if max(len(samples) for _, samples, *_ in found) < 2 and len(runs) > 1 and dataset == "test":
        found = [entry for entry in found if len(entry[1]) > 1]
    curves = []
    for run, samples, updates, values in found:
        points = thin(Points(samples, values), np.ones(len(samples)))
        curves.append((run, points, np.interp(points.x, samples, updates) if len(samples) else updates))
    return _by_both(f"{prefix}{dataset}", name, curves, clock)


RunCurve = tuple[ReportedRun, Points, np.ndarray]
"""A run, a curve by samples, and the updates at its points."""


def train_curve(run: ReportedRun, name: str) -> RunCurve:
    """Return a metric of training by samples."""
    samples = run.files.column("samples")
    points = thin(Points(samples, run.files.column(name)).with_finite_x(), run.files.record_samples)
    return run, points, run.updates_at(points.x)


def _by_both(what: str, name: str, curves: Sequence[RunCurve], clock: Clock) -> list[Figure]:
    label, factor = metric_label(name)
    noun = {"train": "Training"}.get(what, what.rpartition("-")[2].capitalize())
    title = f"{noun} {label.removesuffix(' (%)')}"
    ends = [end for _, points, _ in curves for end in (points.y, points.low) if end is not None]
    values = np.concatenate([end[np.isfinite(end)] for end in ends] or [np.empty(0)])
    is_log = name == "loss" and len(values) > 0 and values.min() > 0 and values.max() > _LOG_RATIO * values.min()
    figures = []
    for by, x_label in (("epoch", clock.label), ("updates", "updates")):
        drawn = []
        for run, points, updates in curves:
            x = updates if by == "updates" else clock.at(points.x)
            moved = Points(x, points.y, points.low, points.high).with_finite_x().scaled(factor)
            drawn.append(Curve(run.label, moved, run.style))
        by_title = f"{title} by {x_label if by == 'epoch' else 'updates'}"
        figures.append(figure(f"{what}-{name}-by-{by}", by_title, (x_label, label), drawn, is_log=is_log))
    return figures


def pair_figures(pairs: Sequence[tuple[ReportedRun, ReportedRun, Style]], clock: Clock) -> list[FigureRow]:
    """Return the difference of the results of each pair, at equal numbers of samples."""
    figures = []
    if not pairs:
        return []
    metric = pairs[0][0].summary.metric
    for name in dict.fromkeys([metric, "loss"]):
        label, factor = metric_label(name)
        curves = []
        for first, second, style in pairs:
            results = [run.evaluated(name, training_dataset(first.files.evaluations)) for run in (first, second)]
            parts = [Points(clock.at(samples), values) for samples, _, values in results]
            points = difference(*parts).scaled(factor)
            curves.append(Curve(f"{first.label} − {second.label}", points, style))
        unit = label.replace("(%)", "(percentage points)")
        title = f"Difference of the {training_dataset(pairs[0][0].files.evaluations)} {label.removesuffix(' (%)')}"
        figures.append(figure(f"difference-{name}", title, (clock.label, unit), curves))
    return row(figures)


def speed_figures(runs: Sequence[ReportedRun], clock: Clock) -> list[FigureRow]:
    """Return the speed of training."""
    curves = []
    for run in runs:
        points = Points(clock.at(run.files.column("samples")), run.files.column("samples_per_s")).with_finite_x()
        curves.append(Curve(run.label, thin(points, run.files.record_seconds), run.style))
    return row([figure("speed", "Speed of training", (clock.label, "samples/s"), curves)])
