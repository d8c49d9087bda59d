"""Curves of a study: the mean over the seeds of each arm, in a band from the lowest to the highest seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.paper.studies.study import Table
from benchmarks.paper.tables import Runs, runs_of
from hvd_batchgrow.reports.curves import Floats, Points, thin
from hvd_batchgrow.reports.document import Curve, Figure, Style
from hvd_batchgrow.reports.figures import figure
from hvd_batchgrow.reports.pictures import pictures
from hvd_batchgrow.reports.runs import NUM_COLORS
from hvd_batchgrow.results.run_files import RunFiles


def svg_files(table: Table, runs: Runs) -> dict[str, bytes]:
    """Return the figures of a table by file name, as SVG."""
    drawn = [pictures(found) for found in study_figures(table, runs)]
    return {name: content for files in drawn for name, content in files.items() if name.endswith(".svg")}


def study_figures(table: Table, runs: Runs) -> list[Figure]:
    """Return the training loss and the evaluations of the arms, by epochs and by updates."""
    found = []
    for what, label, read in (
        ("training loss", "loss", _training_loss),
        (
            f"{table.dataset} {table.result}",
            "accuracy (%)" if table.result == "accuracy" else "loss",
            partial(_evaluations, table),
        ),
    ):
        for by in ("epochs", "updates"):
            name = f"{table.name}-{what}-by-{by}".replace("_", "-").replace(" ", "-")
            curves = [
                Curve(row, _band([read(run) for run in trained.values()], by), Style(k % NUM_COLORS, k // NUM_COLORS))
                for k, row in enumerate(table.rows)
                if (trained := runs_of(table, row, runs))
            ]
            found.append(figure(name, f"{what.capitalize()} by {by}", (by, label), curves, is_log=label == "loss"))
    return [drawn for drawn in found if drawn.curves]


@dataclass(frozen=True)
class _Series:
    """Values of a run, with the epochs and the updates at which they were measured."""

    epochs: Floats
    updates: Floats
    values: Floats


def _training_loss(run: RunFiles) -> _Series:
    """Return the means over consecutive records: a hundred points are enough for a figure."""
    epochs = run.column("epoch")
    means = thin(Points(epochs, run.column("loss")), run.record_samples, most=100)
    return _Series(means.x, np.interp(means.x, epochs, run.column("updates")), means.y)


def _evaluations(table: Table, run: RunFiles) -> _Series:
    lines = [line for line in run.evaluations if line["dataset"] == table.dataset]
    key, factor = ("top1", 100) if table.result == "accuracy" else ("loss", 1)
    epochs, updates, values = (np.array([line[key] for line in lines], float) for key in ("epoch", "updates", key))
    return _Series(epochs, updates, factor * values)


def _band(runs: Sequence[_Series], by: str) -> Points:
    """Return the mean of runs with their extremes, at the epochs of the first one; others are interpolated there.

    By updates, x is the mean of their updates at these epochs: a trigger decides at other epochs with each seed.
    """
    epochs = runs[0].epochs
    values = np.array([np.interp(epochs, run.epochs, run.values) for run in runs])
    x = epochs if by == "epochs" else np.mean([np.interp(epochs, run.epochs, run.updates) for run in runs], axis=0)
    return Points(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))
