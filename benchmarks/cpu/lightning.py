"""Compare `hvd-batchgrow train` with Lightning and its GradientAccumulationScheduler, from a separate folder."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.cpu.cases import MICRO_BATCH, case_of
from benchmarks.cpu.contestant import closing_all
from benchmarks.cpu.loops import OURS, in_turns, ours, start
from benchmarks.peers import installed
from benchmarks.rows.figures import Group, Outcome, compare
from benchmarks.rows.row import Settings, say

PACKAGES = ("lightning==2.6.1", "lightning-utilities==0.15.2", "torchmetrics==1.8.2", "PyYAML", "tqdm", "packaging")
"""Installed without their requirements; torch is that of this environment."""
LIGHTNING = "Lightning"


def run(name: str, settings: Settings) -> Outcome:
    """Measure the row."""
    say("installing Lightning")
    packages = installed(PACKAGES)
    case = case_of("small", is_tiny=settings.is_tiny)
    groups: list[Group] = []
    for index, (batch, num_updates) in enumerate(case.batches):
        say(f"B {batch}: starting")
        words = ["tiny" if settings.is_tiny else "full", str(batch), str(num_updates)]
        command = [sys.executable, "-m", "benchmarks.cpu.by_lightning", str(packages), *words]
        with tempfile.TemporaryDirectory() as folder, closing_all() as started:
            samples = batch * num_updates
            started[LIGHTNING] = start(Path(folder), "lightning", command, 1, samples)
            started[OURS] = ours(Path(folder), "ours", case, batch, num_updates)
            rates = in_turns(started, settings, index, len(case.batches))
        title = f"{case.title}, B {batch:,}, micro-batches of {MICRO_BATCH}"
        groups.append(compare(title, "samples/s", rates, LIGHTNING))
    return Outcome(groups, [f"{PACKAGES[0]}, GradientAccumulationScheduler, no logger, no progress bar"])
