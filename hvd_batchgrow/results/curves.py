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
"""Sample counters, rising, and the value at each."""


@dataclass(frozen=True)
class CurveDistance:
    """The difference of two curves, by samples, as the mean over the pairs of runs."""

    metric: str
    dataset: str
    """The set that was evaluated during training."""
    samples: tuple[int, ...]
    """Evaluations of the curve with the fewest. The other curves are interpolated between evaluations over samples,
    never over updates or epochs."""
    epochs: tuple[float, ...] | None
    """The same in epochs; None: the training sets differ in their size, so an epoch of one is not one of the other."""
    differences: tuple[float, ...]
    """First minus second at each of them, in the unit of the comparison."""

    @property
    def axis(self) -> str:
        """What a place on the curves is: epoch or sample."""
        return "sample" if self.epochs is None else "epoch"

    @property
    def places(self) -> tuple[float, ...]:
        """Epochs, or the samples if there are no common epochs."""
        return self.samples if self.epochs is None else self.epochs

    def place_text(self, place: float) -> str:
        """Return a place as text: `3.1` epochs or `1,920` samples."""
        return f"{place:,.0f}" if self.epochs is None else f"{place:.1f}"

    @property
    def mean(self) -> float:
        """Mean of the absolute differences."""
        return float(np.mean(np.abs(self.differences)))

    @property
    def largest(self) -> tuple[float, float]:
        """The place of the largest absolute difference, and that difference."""
        k = int(np.argmax(np.abs(self.differences)))
        return self.places[k], self.differences[k]

    def apart(self, margin: float) -> tuple[tuple[float, float], ...]:
        """Return the first and last place of each series of evaluations with the arms more than a margin apart."""
        stretches: list[tuple[float, float]] = []
        was_far = False
        for place, difference in zip(self.places, self.differences, strict=True):
            is_far = abs(difference) > margin
            if is_far and was_far:
                stretches[-1] = stretches[-1][0], place
            elif is_far:
                stretches.append((place, place))
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
    sizes = {int(run.plan["num_samples"]) for pair in pairs for run in pair}
    epochs = tuple((grid / sizes.pop()).tolist()) if len(sizes) == 1 else None
    return CurveDistance(metric, dataset, tuple(map(int, grid)), epochs, tuple(np.mean(each, axis=0).tolist()))


def _curve(run: RunFiles, metric: str, dataset: str) -> Curve:
    """Return the curve of a metric over samples."""
    lines = [line for line in run.evaluations if line.get("dataset") == dataset]
    points = {line["samples"]: value for line in lines if (value := number(line.get(metric))) is not None}
    samples = np.array(sorted(points), dtype=np.float64)
    return samples, np.array([points[count] for count in sorted(points)])
