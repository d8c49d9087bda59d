"""Read all records of a run: what can be read, and what cannot."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from hvd_batchgrow.messages.errors import RunError, unreadable
from hvd_batchgrow.results.forked_from import ForkedFrom
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.results.records import printable
from hvd_batchgrow.schedule.job_model import job_model
from hvd_batchgrow.storage.json_lines import Line, scan_json_lines
from hvd_batchgrow.storage.regular_files import read_regular

Columns = Mapping[str, NDArray[np.float64]]
"""Columns by name, all of the same length; NaN where a row has no value."""


@dataclass(frozen=True)
class RunFiles:
    """The records of a run, finished or not, damaged or not."""

    folder: Path
    plan: Mapping[str, Any]
    """plan.json; with the job as `job_file`."""
    train: Columns
    """The training records of metrics.jsonl, one row each. The keys of an object in a record are joined by dots:
    `gradient_noise.all.b_simple`."""
    evaluations: tuple[Line, ...]
    """The evaluations of metrics.jsonl: numbers by name, None where one is not finite, and the text `dataset`."""
    decisions: tuple[Mapping[str, Any], ...]
    """The lines of decisions.jsonl."""
    attempts: tuple[Mapping[str, Any], ...]
    """What record.json says of each invocation."""
    faults: tuple[str, ...] = ()
    """What could not be read, one sentence each."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What record.json says of the training set; empty for runs of older versions."""
    forked_from: ForkedFrom | None = None
    """The checkpoint that a fork continues from: what precedes it is another run's. None: the run is not a fork."""
    branches: tuple[Line, ...] = ()
    """The lines of branches.jsonl."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.plan["job"])

    @cached_property
    def job(self) -> Mapping[str, Any]:
        """The job file, as a tree of plain values, with the defaults of keys that are newer than the run."""
        tree: Mapping[str, Any] = self.plan["job_file"]
        try:
            return job_model().model_validate(tree).model_dump(mode="json")
        except ValidationError:  # of another version
            return tree

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.job["seed"])

    @property
    def last_attempt(self) -> Mapping[str, Any]:
        """What record.json says of the last invocation; nothing if it names none."""
        return self.attempts[-1] if self.attempts else {}

    @property
    def samples(self) -> int:
        """Sample counter of the last record."""
        trained = int(self.column("samples")[-1]) if self.train else 0
        return max(trained, *(int(line["samples"]) for line in self.evaluations[-1:]), 0)

    @property
    def updates(self) -> int:
        """Updates up to the last training record."""
        updates = self.column("updates")
        return int(updates[-1]) if len(updates) and np.isfinite(updates[-1]) else 0

    @property
    def is_finished(self) -> bool:
        """Whether the plan has been trained to its end."""
        return self.samples >= int(self.plan["end_samples"])

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Seconds of training up to each training record, without evaluations, checkpoints and start-up."""
        return np.cumsum(self.record_seconds)

    @cached_property
    def record_samples(self) -> NDArray[np.float64]:
        """Samples of each training record: it begins where the one before it ends."""
        return np.diff(self.column("samples"), prepend=0.0)

    @cached_property
    def record_seconds(self) -> NDArray[np.float64]:
        """Seconds of the updates of each training record; 0 if they are not on record."""
        samples, speed = self.record_samples, self.column("samples_per_s")
        with np.errstate(over="ignore"):
            seconds = np.divide(samples, speed, out=np.zeros_like(samples), where=speed > 0)
        return np.where(np.isfinite(seconds), seconds, 0.0)

    @property
    def rank_hours(self) -> NDArray[np.float64]:
        """Hours of the updates of each training record times the ranks that trained them; NaN: ranks not on record."""
        return self.record_seconds * self.column("ranks") / 3600

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a column of the training records; NaN in every row if none has a value."""
        rows = len(self.train.get("samples", ()))
        return self.train[name] if name in self.train else np.full(rows, np.nan)

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read a run folder.

        Raises:
            RunError: it is not a run folder, or its plan.json is damaged. Faults of other files are in `faults`.
        """
        plan, faults = read_plan(folder), list[str]()
        train, evaluations = _read_metrics(folder / "metrics.jsonl", faults)
        decisions = [line for line in _lines(folder / "decisions.jsonl", faults) if "old_batch" in line]
        record = read_record(folder / "record.json", faults)
        branches = tuple(_lines(folder / "branches.jsonl", faults))
        return cls(
            folder=folder,
            plan=plan,
            train=train,
            evaluations=tuple(evaluations),
            decisions=tuple(decisions),
            attempts=tuple(record.get("attempts", ())),
            faults=tuple(faults),
            data=record.get("data", {}),
            forked_from=ForkedFrom.of(record),
            branches=branches,
        )


def _lines(path: Path, faults: list[str]) -> Iterable[Line]:
    """Yield the readable lines of a file; add a sentence for those that are not, except for an unfinished last one."""
    unreadable: list[int] = []
    last = 0
    try:
        for last, line in scan_json_lines(path):
            if line is None:
                unreadable.append(last)
            else:
                yield line
    except RunError as error:
        faults.append(str(error))
    if unreadable and unreadable[-1] == last:  # cut short by a kill; not a fault
        unreadable.pop()
    if unreadable:
        which = ", ".join(map(str, unreadable[:5])) + (", …" if len(unreadable) > 5 else "")
        faults.append(f"{path} is damaged: {len(unreadable)} of {last} lines cannot be read: {which}")


def _read_metrics(path: Path, faults: list[str]) -> tuple[Columns, list[Line]]:
    """Return the training records as columns, and the evaluations. A line whose counter goes back is a fault."""
    columns: dict[str, array[float]] = {}
    evaluations: list[Line] = []
    samples = num_rows = num_back = 0
    for line in _lines(path, faults):
        if line["samples"] < samples:
            num_back += 1
            continue
        samples = line["samples"]
        if line.get("kind") == "eval":
            evaluations.append({"dataset": str(line.get("dataset", "test")), **_results(line)})
            continue
        for name, value in _numbers(line):
            if (column := columns.get(name)) is None:
                column = columns[name] = array("d")
            if len(column) < num_rows:
                column.extend([float("nan")] * (num_rows - len(column)))
            column.append(value)
        num_rows += 1
    for column in columns.values():
        column.extend([float("nan")] * (num_rows - len(column)))
    if num_back:
        faults.append(f"{path} is damaged: the sample counter goes back in {num_back} lines, which were skipped")
    return {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}, evaluations


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            yield f"{prefix}{key}", float(value)


def _results(line: Line) -> Line:
    """Return the numbers of an evaluation in their order; None for a number that is not finite, which is null."""
    numbers = dict(_numbers(line))
    names = (name for name, value in line.items() if value is None or isinstance(value, float) or name in numbers)
    return {**dict.fromkeys(names), **numbers}


def error_of(attempts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first line of the error with which the last attempt ended; None: it has ended without one, or runs."""
    error = attempts[-1].get("error") if attempts else None
    return printable(error) if isinstance(error, str) else None


def read_attempts(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the attempts of `record.json`; nothing if it cannot be read."""
    attempts: Sequence[Mapping[str, Any]] = read_record(path, []).get("attempts", ())
    return attempts


def read_record(path: Path, faults: list[str]) -> Mapping[str, Any]:
    """Return `record.json`; nothing and a further fault if it cannot be read."""
    try:
        return load_record(path)
    except OSError as error:
        faults.append(str(unreadable(path, error)))
    except RunError as error:
        faults.append(str(error))
    return {}


def load_record(path: Path) -> Mapping[str, Any]:
    """Return `record.json`.

    Raises:
        OSError: it cannot be read.
        RunError: it is damaged.
    """
    try:
        record: Mapping[str, Any] = json.loads(read_regular(path))
        attempts = record["attempts"]
        if not isinstance(attempts, list) or not all(isinstance(attempt, dict) for attempt in attempts):
            raise TypeError("attempts is not a list of objects")
        if not isinstance(record.get("data", {}), dict):
            raise TypeError("data is not an object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    return record
