"""Read what a run has done from its folder, without torch."""

from __future__ import annotations

import json
import shlex
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import Direction
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.suggest import near_run
from hvd_batchgrow.messages.wording import result_text
from hvd_batchgrow.results.records import NOT_METRICS, is_usable, number, printable, task_name
from hvd_batchgrow.results.run_files import RunFiles, error_of
from hvd_batchgrow.storage.json_lines import Line
from hvd_batchgrow.storage.regular_files import read_regular

State = Literal["running", "finished", "failed", "stopped"]
FRESH_S = 30.0
"""The holder of a run's lock renews its mark every 5 s; an older mark is that of a process that was killed."""


@dataclass(frozen=True)
class RunSummary:
    """A run, as far as its files tell."""

    folder: Path
    name: str
    policy: str
    state: State
    """running: a process holds the run's lock. failed: the last attempt ended with an error. finished: the plan
    has been trained to its end. stopped: none of these."""
    error: str | None
    """First line of the error of a failed run."""
    host: str | None
    """Process and host that train a running run."""
    samples: int
    """Sample counter of the last record."""
    end_samples: int
    epoch: float
    epochs: float
    updates: int
    num_updates: int
    """Of the whole plan."""
    training_s: float
    """Time of the updates on record, without evaluations, checkpoints and start-up."""
    metric: str
    """Name of the main result: the first metric of the task, or "loss"."""
    last: float | None
    """Its value in the last evaluation, which is of the test set, unless only the validation set has been evaluated.
    None: it or a loss of the evaluation is not finite, or there was no evaluation."""
    last_dataset: str | None
    """None: there was no evaluation."""
    best: float | None
    """Its best value on `best_dataset`; None if it is unknown how the metric improves."""
    best_dataset: str
    """The set that is evaluated during training."""
    attempts: int
    """Number of invocations."""
    twin: str | None
    """Name of the other run of a pair, if it is in the same folder of runs."""
    batches: tuple[int, ...]
    """Global batch of each phase."""
    faults: tuple[str, ...] = ()
    """What could not be read."""

    @property
    def state_text(self) -> str:
        """The state, with the error of a failed run."""
        return f"{self.state}: {self.error}" if self.error else self.state

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "folder": str(self.folder), "batches": list(self.batches)}


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders in a folder, sorted by name; the folder itself if it is a run.

    Raises:
        RunError: it does not exist, or contains no run.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder{near_run(folder, or_runs=True)}")
    if (folder / "plan.json").exists():
        return [folder]
    # Hidden folders are leftovers of a killed `train`, such as `.NAME.removed` after --overwrite.
    found = sorted(path.parent for path in folder.glob("[!.]*/plan.json"))
    if not found:
        raise RunError(f"{folder} contains no run: a run folder has a plan.json, and train writes it to runs/NAME")
    return found


def read_runs(folders: Iterable[Path]) -> tuple[list[RunFiles], list[str]]:
    """Return the runs in the folders, each once, and an error message for each run that cannot be read.

    Raises:
        RunError: a folder does not exist, or contains no run.
    """
    paths = {path.resolve(): path for folder in folders for path in find_runs(folder)}
    runs, faults = list[RunFiles](), list[str]()
    for path in paths.values():
        try:
            runs.append(RunFiles.read(path))
        except RunError as error:
            faults.append(str(error))
    return runs, faults


def read_summary(folder: Path) -> RunSummary:
    """Return the summary of a run.

    Raises:
        RunError: it is not a run folder, or its plan.json is damaged.
    """
    return summarize(RunFiles.read(folder))


def summarize(run: RunFiles) -> RunSummary:
    """Return the summary of a run whose files have been read."""
    folder, plan, evaluated = run.folder, run.plan, run.evaluations
    metric, direction = main_metric(run)
    results = [
        (number(line[metric]) if is_usable(line) else None, line["dataset"]) for line in evaluated if metric in line
    ]
    last, last_dataset = results[-1] if results else (None, None)
    best_dataset = training_dataset(evaluated)
    during = [value for value, dataset in results if dataset == best_dataset and value is not None]
    mark, is_fresh = read_mark(folder)
    holder = holder_of(mark) if mark and is_fresh else None
    error = None if holder else error_of(run.attempts)  # a final evaluation that fails follows the last update
    state: State = "running" if holder else "failed" if error else "finished" if run.is_finished else "stopped"
    return RunSummary(
        folder=folder,
        name=printable(run.name),
        policy=printable(run.job["schedule"]["policy"]),
        state=state,
        error=error,
        host=holder,
        samples=run.samples,
        end_samples=plan["end_samples"],
        epoch=run.samples / plan["num_samples"],
        epochs=plan["end_samples"] / plan["num_samples"],
        updates=run.updates,
        num_updates=plan["num_updates"],
        training_s=float(run.seconds[-1]) if run.train else 0.0,
        metric=printable(metric),
        last=last,
        last_dataset=None if last_dataset is None else printable(last_dataset),
        best=None if direction is None or not during else (max if direction == "up" else min)(during),
        best_dataset=best_dataset,
        attempts=len(run.attempts),
        twin=_twin(folder),
        batches=tuple(phase["global_batch"] for phase in plan["phases"] if phase["num_updates"]),
        faults=run.faults,
    )


def main_metric(run: RunFiles) -> tuple[str, Direction | None]:
    """Return the first metric of a run's task or, without one, "loss"; and how it improves, None if that is unknown."""
    if declared_directions(run.job) is None and (described := _described_directions(run.folder)) is not None:
        return next(iter(described.items()), ("loss", "down"))
    return metric_of_job(run.job, run.evaluations)


def _described_directions(folder: Path) -> dict[str, Direction] | None:
    """Return the metrics in model.json, which has those of a custom task; None if they cannot be read."""
    try:
        metrics = json.loads(read_regular(folder / "model.json"))["task"]["metrics"]
        return {name: direction for name, direction in metrics.items() if direction in get_args(Direction)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def metric_of_job(job: Mapping[str, Any], evaluations: Sequence[Line]) -> tuple[str, Direction | None]:
    """Like `main_metric`, from a job as plain values and the evaluations so far."""
    if directions := declared_directions(job):
        name = [*directions, "loss"][1]
        return name, directions[name]
    names = metric_names(evaluations[0]) if evaluations else []
    return (names[0], None) if names else ("loss", "down")


def metric_names(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a task in its order, from an evaluation, in which a value that is not finite is None."""
    found = [name for name, value in evaluation.items() if value is None or number(value) is not None]
    return [name for name in found if name not in NOT_METRICS and not name.startswith("average_")]


def declared_directions(job: Mapping[str, Any]) -> dict[str, Direction] | None:
    """Return how the loss and each metric of a job's task improve; None: the user's own task states it."""
    return TaskSection.model_construct(name=task_name(job)).directions()


def result_line(run: RunSummary) -> str | None:
    """Return the last and the best result of a run in words; None: it has not been evaluated."""
    results = [] if run.last_dataset is None else [f"{run.last_dataset} {result_text(run.metric, run.last)}"]
    if run.best is not None:
        results.append(f"best during training: {run.best_dataset} {result_text(run.metric, run.best)}")
    return ", ".join(results) or None


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run, also if its folder has another name than its job."""
    folder = _with_name(folder)
    try:
        name = tomllib.loads(read_regular(folder / "job.toml").decode()).get("name")
    except (OSError, ValueError):
        name = folder.name  # `train` reports what is wrong with the file
    renamed = [] if name == folder.name else ["--name", folder.name]
    return command("train", folder / "job.toml", *renamed, "--runs-dir", folder.parent, "--resume", "auto")


def command(*words: object) -> str:
    """Return a command line of this program, quoted for a shell."""
    return shlex.join(["hvd-batchgrow", *map(str, words)])


def training_dataset(evaluated: Sequence[Line]) -> str:
    """Return the set that a run with these evaluations evaluates during training: the test set only without another."""
    return "validation" if any(line["dataset"] == "validation" for line in evaluated) else "test"


def lock_path(folder: Path) -> Path:
    """Return the path of a run's lock file, which is next to the real folder if `folder` is a symbolic link."""
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.lock"


def read_mark(folder: Path) -> tuple[str, bool]:
    """Return the mark of the process that holds the lock of a run, and whether it is fresh by this machine's clock.

    The first line of a mark names process and host. It is empty if no process holds the lock.
    """
    path = lock_path(folder)
    try:
        mark = read_regular(path).decode(errors="replace")
        return mark, abs(time.time() - path.stat().st_mtime) < FRESH_S
    except OSError:
        return "", False


def holder_of(mark: str) -> str:
    """Return the process and host of a mark."""
    return printable(mark.partition("\n")[0])


def _with_name(folder: Path) -> Path:
    """Return the same folder with a path that ends in its name: `.` and `..` do not."""
    return folder if folder.name not in {"", ".."} else folder.resolve()


def _twin(folder: Path) -> str | None:
    folder = _with_name(folder)
    name = folder.name.removesuffix("-twin") if folder.name.endswith("-twin") else f"{folder.name}-twin"
    return name if (folder.parent / name / "plan.json").exists() else None
