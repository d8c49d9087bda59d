"""Seconds from the start of a process to the end of its first update."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.cpu.cases import Case, case_of
from benchmarks.cpu.contestant import Contestant, closing_all
from benchmarks.cpu.loops import BY_HAND, OURS, TRAIN, contestants, environment, launcher, start, write_job
from benchmarks.cpu.pausing import UPDATES
from benchmarks.rows.figures import Figure, Group, Outcome, ratios_of
from benchmarks.rows.row import LEAST_TURNS, Settings, say

RESUMED = "hvd_batchgrow, resumed"
STOPPED = 75
"""Exit code of a run that has been stopped and can be resumed."""


def run(name: str, settings: Settings) -> Outcome:
    """Start each contestant of one rank and of two ranks, in turns."""
    return Outcome([group(num_ranks, settings) for num_ranks in (1, 2)])


def group(num_ranks: int, settings: Settings) -> Group:
    """Return the seconds of each contestant for a number of ranks."""
    case = case_of("small", is_tiny=settings.is_tiny)
    titles = [title for title in (*BY_HAND[num_ranks].values(), OURS) if "channels_last" not in title] + [RESUMED]
    seconds: dict[str, list[float]] = {title: [] for title in titles}
    is_over = settings.part(num_ranks - 1, 2)
    with tempfile.TemporaryDirectory() as stopped:
        resume = stopped_run(Path(stopped), case, num_ranks)
        while len(seconds[OURS]) < LEAST_TURNS or not (is_over() or settings.is_tiny):
            with tempfile.TemporaryDirectory() as folder:
                row = "loop" if num_ranks == 1 else "ranks"
                begin = contestants(Path(folder), row, case, settings, 128, 1, num_ranks) | {RESUMED: resume}
                for title in titles[:: -1 if len(seconds[OURS]) % 2 else 1]:
                    say(f"starting: {title}, ranks: {num_ranks}")
                    seconds[title].append(started_s(begin[title]))
    reference, *others = titles
    figures = [Figure(reference, seconds[reference])]
    figures += [Figure(title, seconds[title], ratios_of(seconds[title], seconds[reference])) for title in others]
    return Group(f"to the end of the first update, ranks: {num_ranks}", "s", figures, reference)


def stopped_run(folder: Path, case: Case, num_ranks: int) -> Callable[[], Contestant]:
    """Stop a run after its first update, and return a function that resumes it from this checkpoint."""
    write_job(folder / "run", case, 128)
    command = [*launcher(num_ranks), *TRAIN, "--max-updates", "1", "--logging.observers", "[]"]
    done = subprocess.run(
        command, cwd=folder / "run", env=os.environ | environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != STOPPED:
        raise RuntimeError(f"train has ended with code {done.returncode}: {done.stderr}")
    return partial(start, folder, "run", [*TRAIN, "--resume", "auto"], num_ranks, 128, {UPDATES: "1"})


def started_s(begin: Callable[[], Contestant]) -> float:
    """Return the seconds until a contestant has done an update, and end it."""
    with closing_all() as started:
        before = time.perf_counter()
        started["it"] = begin()
        return time.perf_counter() - before
