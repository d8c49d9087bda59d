"""Print the critical batches that the branches of runs have shown, beside the gradient noise scale that they measured.

python -m benchmarks.critical_batch RUN … [--tolerance 0.01] [--figure critical_batch]

The runs differ in the seed only, have branches at the same checkpoints (`hvd-batchgrow branch`), and were trained with
gradient_noise.measure = true. --figure writes NAME.png and NAME.svg.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvd_batchgrow.reports.curves import Points
from hvd_batchgrow.reports.document import Curve, Figure, Style
from hvd_batchgrow.reports.pictures import pictures
from hvd_batchgrow.results.branch_evidence import find_branches
from hvd_batchgrow.results.run_files import RunFiles


@dataclass(frozen=True)
class Row:
    """A checkpoint of one run."""

    epoch: float
    global_batch: int
    lr: float
    critical: int
    """Without a tolerance."""
    within: int
    """With the tolerance."""
    largest: int
    """The largest batch that was tried."""
    b_simple: float
    """Median of the records of the quarter epoch before the checkpoint."""


def rows_of(folder: Path, tolerance: float) -> list[Row]:
    """Return the checkpoints of a run that have finished branches, in order."""
    run = RunFiles.read(folder)
    num_samples, seen = int(run.plan["num_samples"]), run.column("samples")
    noise = run.column("gradient_noise.all.b_simple")
    found = []
    for branches in find_branches(folder):
        plain, within = branches.compare(None), branches.compare(tolerance)
        before = (seen <= branches.samples) & (seen > branches.samples - num_samples / 4)
        first, *_, last = plain.results
        epoch, scale = branches.samples / num_samples, float(np.median(noise[before]))
        own = first.record
        batches = plain.critical_batch, within.critical_batch, last.record.global_batch
        found.append(Row(epoch, own.global_batch, own.lr, *batches, scale))
    return found


def table(runs: Sequence[list[Row]], tolerance: float) -> str:
    """Return a Markdown table with a row for each checkpoint; values of the runs in their order."""
    head = f"| epoch | batch | lr | critical batch | with tolerance {tolerance:g} | largest batch tried | B_simple |"
    lines = [head, "|---:|---:|---:|---|---|---:|---|"]
    for rows in zip(*runs, strict=True):
        first = rows[0]
        critical = ", ".join(f"{row.critical:,}" for row in rows)
        within = ", ".join(f"{row.within:,}" for row in rows)
        noise = ", ".join(f"{row.b_simple:,.0f}" for row in rows)
        cells = f"{first.global_batch:,} | {first.lr:g} | {critical} | {within} | {first.largest:,} | {noise}"
        lines.append(f"| {first.epoch:.0f} | {cells} |")
    return "\n".join(lines)


def figure(runs: Sequence[list[Row]], folders: Sequence[Path], tolerance: float) -> Figure:
    """Return critical batches and B_simple over the epochs: medians, with bands from the least to the largest run."""
    checkpoints = list(zip(*runs, strict=True))
    curves = [
        _curve(f"critical batch, tolerance {tolerance:g}", checkpoints, "within", 1),
        _curve("critical batch", checkpoints, "critical", 0),
    ]
    noises = [RunFiles.read(folder) for folder in folders]
    epochs = noises[0].column("samples") / int(noises[0].plan["num_samples"])
    b_simple = np.stack([run.column("gradient_noise.all.b_simple") for run in noises])
    points = Points(epochs, np.median(b_simple, 0), b_simple.min(0), b_simple.max(0))
    curves.append(Curve("B_simple", points, Style(2)))
    title = f"Median of {len(runs)} seeds, from the least to the largest"
    return Figure("critical_batch", title, "epoch", "samples", tuple(curves), is_log=True)


def _curve(label: str, checkpoints: Sequence[tuple[Row, ...]], key: str, color: int) -> Curve:
    values = [[float(getattr(row, key)) for row in rows] for rows in checkpoints]
    middle, low, high = (np.array([f(v) for v in values]) for f in (statistics.median, min, max))
    return Curve(label, Points(np.array([rows[0].epoch for rows in checkpoints]), middle, low, high), Style(color))


def main() -> None:
    """Print the table, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    runs = [rows_of(folder, options.tolerance) for folder in options.runs]
    print(table(runs, options.tolerance))
    if options.figure:
        drawn = pictures(figure(runs, options.runs, options.tolerance))
        for name, data in drawn.items():
            options.figure.with_suffix(Path(name).suffix).write_bytes(data)


if __name__ == "__main__":
    main()
