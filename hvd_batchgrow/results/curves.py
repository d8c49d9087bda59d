"""Distance between the curves of two arms, at equal numbers of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.results.records import number
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import training_dataset

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Epochs, rising, and the value at each."""


@dataclass(frozen=True)
class CurveDistance:
    """The difference of two curves, by epoch, as the mean over the pairs of runs."""

    metric: str
    dataset: str
    """The set that was evaluated during training."""
    epochs: tuple[float, ...]
    """Epochs of the curve with the fewest evaluations. The other curves are interpolated between evaluations over
    samples, never over updates."""
    differences: tuple[float, ...]
    """First minus second at each epoch, in the unit of the comparison."""

    @property
    def mean(self) -> float:
        """Mean of the absolute differences."""
        return float(np.mean(np.abs(self.differences)))

    @property
    def largest(self) -> tuple[float, float]:
        """The epoch of the largest absolute difference, and that difference."""
        k = int(np.argmax(np.abs(self.differences)))
        return self.epochs[k], self.differences[k]

    def apart(self, margin: float) -> tuple[tuple[float, float], ...]:
        """Return the first and last epoch of each series of evaluations with the arms more than a margin apart."""
        stretches: list[tuple[float, float]] = []
        was_far = False
        for epoch, difference in zip(self.epochs, self.differences, strict=True):
            is_far = abs(difference) > margin
            if is_far and was_far:
                stretches[-1] = stretches[-1][0], epoch
            elif is_far:
                stretches.append((epoch, epoch))
            was_far = is_far
        return tuple(stretches)


def curve_distance(
    pairs: Sequence[tuple[RunFiles, RunFiles]], metric: str, factor: float = 1.0
) -> CurveDistance | None:
    """Return the distance between the curves of pairs of runs; None: they have fewer than two evaluations in common.

    Args:
        pairs: runs of one seed each.
        metric: name of the result, the same as at the end.
        factor: 100 for a metric in percentage points.
    """
    datasets = {training_dataset(run.evaluations) for pair in pairs for run in pair}
    if len(datasets) != 1:
        return None
    dataset = datasets.pop()
    curves = [(_curve(first, metric, dataset), _curve(second, metric, dataset)) for first, second in pairs]
    grid = min((curve[0] for pair in curves for curve in pair), key=len)
    if len(grid) < 2:
        return None
    slack = float(np.median(np.diff(grid))) / 2  # the last updates of two runs rarely end at the same sample
    start = max(curve[0][0] for pair in curves for curve in pair) - slack
    end = min(curve[0][-1] for pair in curves for curve in pair) + slack
    grid = grid[(grid >= start) & (grid <= end)]
    if len(grid) < 2:
        return None
    each = [factor * (np.interp(grid, *first) - np.interp(grid, *second)) for first, second in curves]
    return CurveDistance(metric, dataset, tuple(grid.tolist()), tuple(np.mean(each, axis=0).tolist()))


def _curve(run: RunFiles, metric: str, dataset: str) -> Curve:
    """Return the curve of a metric over epochs, by the sample counter."""
    lines = [line for line in run.evaluations if line.get("dataset") == dataset]
    points = {line["samples"]: value for line in lines if (value := number(line.get(metric))) is not None}
    samples = np.array(sorted(points), dtype=np.float64)
    return samples / int(run.plan["num_samples"]), np.array([points[count] for count in sorted(points)])
