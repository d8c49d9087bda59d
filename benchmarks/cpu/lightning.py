"""Compare `hvd-batchgrow train` with Lightning and its GradientAccumulationScheduler, from a separate folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cpu.cases import MICRO_BATCH, case_of
from benchmarks.cpu.contestant import closing_all
from benchmarks.cpu.loops import OURS, in_turns, ours, start
from benchmarks.rows.figures import Group, Outcome, compare
from benchmarks.rows.row import Settings, Skip, say

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


def installed(packages: tuple[str, ...]) -> Path:
    """Return a folder with packages, which is made once for each list of them. Raises Skip if pip fails."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd-batchgrow" / "peers"
    folder = base / "+".join([*packages, f"python{sys.version_info[0]}.{sys.version_info[1]}"])
    if folder.exists():
        return folder
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as unfinished:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", unfinished, *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise Skip(f"pip cannot install {packages[0]}: {lines[-1]}")
        os.rename(Path(unfinished), folder)
        Path(unfinished).mkdir()  # for the end of the block
    return folder
