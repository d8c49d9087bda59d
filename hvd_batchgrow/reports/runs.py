"""The runs of a report, and what its sections need of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.reports.curves import Floats
from hvd_batchgrow.reports.document import Style
from hvd_batchgrow.reports.text import clean
from hvd_batchgrow.results.comparison import group_runs
from hvd_batchgrow.results.records import number as finite
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.run_summary import RunSummary, read_runs, summarize

NUM_COLORS, NUM_DASHES = 8, 4
BATCH_DASH = NUM_DASHES
"""Dashes of the batch of a run, beside its noise scale: those of no run."""
_SETTINGS = ("global_batch", "lr", "momentum", "ranks", "accumulation")


@dataclass(frozen=True)
class ReportedRun:
    """A run of a report."""

    files: RunFiles
    summary: RunSummary
    label: str
    """Its name in the report."""
    style: Style

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.files.folder

    @property
    def phases(self) -> Sequence[Mapping[str, Any]]:
        """The phases of the plan."""
        phases: Sequence[Mapping[str, Any]] = self.files.plan["phases"]
        return phases

    def updates_at(self, samples: Floats) -> Floats:
        """Return the updates done at sample counters, interpolated between the training records."""
        at, updates = self.files.column("samples"), self.files.column("updates")
        known = np.isfinite(updates)
        if not known.any():
            return np.full(len(samples), np.nan)
        found = np.interp(samples, np.append(0.0, at[known]), np.append(0.0, updates[known]))
        return np.asarray(found)

    def settings(self, row: int) -> Mapping[str, float]:
        """Return batch, learning rate, momentum, ranks and accumulation of a training record, as far as it has them."""
        if not 0 <= row < len(self.files.column("samples")):
            return {}
        values = {name: float(self.files.column(name)[row]) for name in _SETTINGS}
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def evaluated(self, name: str, dataset: str) -> tuple[Floats, Floats, Floats]:
        """Return samples, updates and values of the evaluations of a set that have a value of this name."""
        lines = [line for line in self.files.evaluations if line.get("dataset") == dataset]
        lines = [line for line in lines if finite(line.get(name)) is not None]
        samples, values = (np.array([float(line[key]) for line in lines]) for key in ("samples", name))
        counted = np.array([_number_or_nan(line.get("updates")) for line in lines])
        return samples, np.where(np.isfinite(counted), counted, self.updates_at(samples)), values


def _number_or_nan(value: Any) -> float:
    number = finite(value)
    return float("nan") if number is None else number


def reported_runs(paths: Sequence[Path]) -> tuple[list[ReportedRun], list[str]]:
    """Read runs and folders of runs, each run once; return them, and what could not be read.

    Raises:
        RunError: a path is not a folder or contains no run, or no run can be read.
    """
    files, faults = read_runs(paths)
    if not files:
        raise RunError("no run can be reported:\n  " + "\n  ".join(faults))
    faults += [fault for run in files for fault in run.faults]
    labels, styles = _labels([run.folder for run in files]), _styles(files)
    runs = zip(files, labels, styles, strict=True)
    return [ReportedRun(run, summarize(run), label, style) for run, label, style in runs], faults


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the names of folders, with as many parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len({*labels}) == len(labels):
            break
    return [clean(label, 80) for label in labels]


def _styles(runs: Sequence[RunFiles]) -> list[Style]:
    """Return a color for each job; runs that differ in their seed share it, and differ in their dashes."""
    arms = group_runs(runs)
    styles = {}
    for index, arm in enumerate(arms):
        for k, run in enumerate(arm.runs):
            dash = index if len(arms) == len(runs) else k
            styles[run.folder] = Style(index % NUM_COLORS, dash % NUM_DASHES)
    return [styles[run.folder] for run in runs]


class Clock:
    """The x axis of progress: epochs, or samples if the runs have training sets of unequal size.

    An epoch of another training set is another number of samples, so curves by epoch would lie beside each other as
    if they were equal.
    """

    def __init__(self, runs: Sequence[ReportedRun]) -> None:
        sizes = {int(run.files.plan["num_samples"]) for run in runs}
        self.label = "epochs" if len(sizes) == 1 else "samples"
        self._unit = sizes.pop() if len(sizes) == 1 else 1

    def at(self, samples: Floats) -> Floats:
        """Return the x of sample counters."""
        return np.asarray(samples / self._unit)
