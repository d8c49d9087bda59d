"""Measure the wall time of AdaBatch's three schedules on 1, 2 and 4 ranks of this machine.

python -m benchmarks.paper.wall_time [--ranks 1 2 4] [--turns 3]

Each turn trains a fixed small batch, a growing batch and a fixed large batch on each number of ranks, for a twentieth
of the epochs of the study. Times are those of the updates, without start-up, evaluations and checkpoints. The results
are written to docs/results/wall_time.json, from which `python -m benchmarks.paper write` makes a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.studies.fashion_mnist import ADABATCH, FIXED, LARGE, ghost_batch
from benchmarks.paper.studies.study import QUIET, keys
from benchmarks.paper.training import ROOT
from hvd_batchgrow.results.account import account_of
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.storage.atomic import write_atomically

SHORT = keys(schedule__epochs="0.6", schedule__every_epochs="0.1")
SCHEDULES = {
    "adabatch_small": FIXED,
    "adabatch_grow": {},
    "adabatch_large": FIXED | LARGE | keys(schedule__warmup_epochs="0.1"),
}
RECORD = ROOT / "docs/results/wall_time.json"


def train(name: str, ranks: int, runs: Path) -> tuple[float, int]:
    """Train a schedule once; return the seconds of its updates and their number."""
    changes = QUIET | ghost_batch(32) | SHORT | SCHEDULES[name]
    words = [sys.executable, "-m", "hvd_batchgrow.cli", "train", ADABATCH, "--name", name]
    words += ["--runs-dir", str(runs), "--overwrite"]
    words += [word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", value)]
    launcher = [str(ROOT / "tools/mpirun.sh"), str(ranks)] if ranks > 1 else []
    subprocess.run([*launcher, *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    run = RunFiles.read(runs / name)
    return account_of(run).training_s, run.updates


def measure(all_ranks: Sequence[int], turns: int) -> dict[str, Any]:
    """Return the seconds of each turn by ranks and schedule, and the updates of each schedule."""
    seconds: dict[int, dict[str, list[float]]] = {ranks: {name: [] for name in SCHEDULES} for ranks in all_ranks}
    updates = {}
    with tempfile.TemporaryDirectory() as runs:
        for turn in range(turns):
            for ranks in all_ranks:
                for k in range(len(SCHEDULES)):  # each turn begins with another schedule
                    name = list(SCHEDULES)[(k + turn) % len(SCHEDULES)]
                    found, updates[name] = train(name, ranks, Path(runs))
                    seconds[ranks][name].append(found)
                    print(f"turn {turn + 1}, {ranks} ranks, {name}: {found:.1f} s", file=sys.stderr, flush=True)
    return {"cores": len(os.sched_getaffinity(0)), "updates": updates, "seconds": seconds}


def markdown(record: Mapping[str, Any]) -> str:
    """Return the record as a table: medians, and the range of the ratios to the fixed small batch in each turn."""
    turns = len(next(iter(record["seconds"].values()))["adabatch_small"])
    lines = ["| ranks | schedule | updates | seconds | times faster than `adabatch_small` |", "|---|---|---|---|---|"]
    for ranks, by_name in record["seconds"].items():
        for name, values in by_name.items():
            ratios = [small / one for small, one in zip(by_name["adabatch_small"], values, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
            cells = [ranks, f"`{name}`", f"{record['updates'][name]:,}", f"{statistics.median(values):.1f}", spread]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"Medians of n = {turns} turns on {record['cores']} cores, with the range of the ratios."]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="numbers of ranks; default: 1 2 4")
    parser.add_argument("--turns", type=int, default=3, help="runs of each schedule; default: 3")
    options = parser.parse_args()
    record = measure(options.ranks, options.turns)
    write_atomically(RECORD, json.dumps(record, indent=1).encode() + b"\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
