"""Train the runs of studies, several at a time, and keep their records."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.paper.kept_files import ENDING, pack
from benchmarks.paper.studies.study import Arm, Study

ROOT = Path(__file__).parents[2]
STOPPED = 75
"""Exit code of a run that has been stopped and can be resumed."""

_NOT_STARTED = "not started"


@dataclass(frozen=True)
class Task:
    """An arm of a study with one seed, and its twin if it has one."""

    study: Study
    arm: Arm
    seed: int

    @property
    def runs(self) -> list[str]:
        """The names of its runs."""
        name = f"{self.arm.name}-seed{self.seed}"
        return [name, f"{name}-twin"] if self.arm.has_twin else [name]

    def is_kept(self, results: Path) -> bool:
        """Return whether the records of all runs are in the folder of results."""
        return all((results / self.study.name / f"{run}{ENDING}").exists() for run in self.runs)

    def command(self, work: Path) -> list[str]:
        """Return the command that trains it, or resumes it."""
        command = "twin" if self.arm.has_twin else "train"
        changes = {**self.study.changes, **self.arm.changes}
        return [
            *(sys.executable, "-m", "hvd_batchgrow.cli", command, self.arm.job),
            *("--resume", "auto", "--seed", str(self.seed), "--name", self.runs[0]),
            *("--runs-dir", str(work / self.study.name)),
            *(word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", value)),
        ]


def tasks_of(studies: Iterable[Study], seeds: Sequence[int]) -> Iterator[Task]:
    """Return the tasks of studies, the first seed of every arm before the second one.

    Args:
        studies: what to train.
        seeds: these instead of the studies' own; empty: the studies' own.
    """
    found = [Task(study, arm, seed) for study in studies for arm in study.arms for seed in seeds or study.seeds_of(arm)]
    return iter(sorted(found, key=lambda task: task.seed))


class Trainer:
    """Trains tasks in processes of one rank with one thread each.

    Args:
        work: folder for the run folders, which hold what an interrupted training needs to resume.
        results: folder for the records that are kept.
    """

    def __init__(self, work: Path, results: Path) -> None:
        self._work, self._results = work, results
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def train_all(self, tasks: Sequence[Task], at_a_time: int) -> int:
        """Train tasks, and print a line for each; return the number that failed or were stopped.

        On SIGINT or SIGTERM, the runs in progress write a checkpoint and end.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        failed = 0
        with ThreadPoolExecutor(at_a_time) as pool:
            futures = {pool.submit(self._train, task): task for task in tasks}
            for done, future in enumerate(as_completed(futures), 1):
                outcome = future.result()
                failed += outcome is not None
                if outcome != _NOT_STARTED:
                    name = f"{futures[future].study.name}/{futures[future].runs[0]}"
                    print(f"{time.strftime('%H:%M')} {done} of {len(tasks)}: {name}: {outcome or 'kept'}", flush=True)
        return failed

    def _train(self, task: Task) -> str | None:
        """Train a task and keep its records; return why that was not possible."""
        if self._stopping:
            return _NOT_STARTED
        runs = self._work / task.study.name
        runs.mkdir(parents=True, exist_ok=True)
        log = runs / f"{task.runs[0]}.log"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with log.open("ab") as file:
            process = subprocess.Popen(
                task.command(self._work), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            self._processes.add(process)
            if self._stopping:  # the signal has come before the process was in the set
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self._processes.discard(process)
        if code:
            return "stopped; the next invocation resumes it" if code == STOPPED else f"exit code {code}: see {log}"
        for run in task.runs:
            pack(runs / run, self._results / task.study.name)
        return None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for process in list(self._processes):
            process.send_signal(signal.SIGTERM)
