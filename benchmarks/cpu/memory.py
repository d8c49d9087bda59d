"""Peak memory of a rank against a loop written by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.cpu.cases import case_of
from benchmarks.cpu.contestant import closing_all
from benchmarks.cpu.loops import OURS, contestants, in_turns
from benchmarks.rows.figures import Group, Outcome, compare
from benchmarks.rows.row import Settings, say


def run(name: str, settings: Settings) -> Outcome:
    """Train a few updates with one rank and each contestant, and read the peak of its resident memory."""
    case = case_of("small", is_tiny=settings.is_tiny)
    groups: list[Group] = []
    for index, (batch, num_updates) in enumerate(case.batches):
        say(f"B {batch}: starting")
        with tempfile.TemporaryDirectory() as folder, closing_all() as started:
            for title, begin in contestants(Path(folder), "loop", case, settings, batch, num_updates, 1).items():
                started[title] = begin()
            in_turns(started, settings, index, len(case.batches))
            peaks = {title: [contestant.peak_memory()[0] / 2**20] for title, contestant in started.items()}
        groups.append(compare(f"{case.title}, B {batch:,}", "MiB", peaks, next(iter(peaks))))
    return Outcome(groups, [f"{OURS}: the whole process of `train`, with the images of the data source mapped"])
