"""metrics.jsonl: a line per training record and evaluation; consumed.jsonl: per update; branches.jsonl: per branch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hvd_batchgrow.storage.json_lines import JsonLines, Line, read_json_lines
from hvd_batchgrow.train.events import (
    BranchesCompared,
    BranchStarted,
    Evaluation,
    Observer,
    RunStarted,
    TrainRecord,
    UpdateDone,
)
from hvd_batchgrow.train.run.record_gaps import MISSING_TO, is_before, record_gap


class MetricsFile(Observer):
    """Appends to `metrics.jsonl`."""

    def on_start(self, event: RunStarted) -> None:
        """Keep the records of earlier attempts up to the checkpoint; the rest will be trained again."""
        start, repeated = event.samples, event.samples if event.repeats_evaluation else None

        def is_kept(line: Line) -> bool:
            return start > 0 and line["samples"] <= start and (line["kind"], line["samples"]) != ("eval", repeated)

        self._file = JsonLines(event.folder / "metrics.jsonl", is_kept)

    def on_record(self, event: TrainRecord) -> None:
        """Append a training record."""
        self._file.append(record_line(event))

    def on_evaluation(self, event: Evaluation) -> None:
        """Append an evaluation."""
        self._file.append(evaluation_record(event))

    def for_branch(self) -> MetricsFile:
        """Return the observer that writes the same file of a branch."""
        return MetricsFile()


class BranchesFile(Observer):
    """Appends to `branches.jsonl`: a line at the start of each branch of a pause, and one with their result."""

    def on_start(self, event: RunStarted) -> None:
        """Keep the lines of earlier attempts up to the checkpoint. Only a run with branches gets the file."""
        start, path = event.samples, event.folder / "branches.jsonl"
        if event.job.trigger.trains_branches:
            self._file = JsonLines(path, lambda line: start > 0 and line["samples"] <= start)

    def on_branch(self, event: BranchStarted) -> None:
        """Append the start of a branch."""
        self._file.append({"kind": "branch", **asdict(event), "text": event.describe()})

    def on_branches(self, event: BranchesCompared) -> None:
        """Append the result of the branches."""
        self._file.append({"kind": "branches", **asdict(event), "text": event.describe()})


def record_line(event: TrainRecord) -> Line:
    """Return the line of a training record."""
    return {"kind": "train", **_flat(asdict(event))}


def evaluation_record(event: Evaluation) -> Line:
    """Return the line of an evaluation."""
    where = {"samples": event.samples, "epoch": event.epoch, "updates": event.updates}
    return {"kind": "eval", **where, **event.named(), "dataset": event.dataset}


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with the metrics in place of `metrics`."""
    return {k: v for key, value in line.items() for k, v in (value.items() if key == "metrics" else [(key, value)])}


class ConsumedFile(Observer):
    """Appends to `consumed.jsonl`, from which `audit` verifies which samples a run has used."""

    def on_start(self, event: RunStarted) -> None:
        """Keep the records of earlier attempts up to the checkpoint; the rest will be trained again."""
        start, path = event.samples, event.folder / "consumed.jsonl"
        self._file = JsonLines(path, lambda line: is_before(line, start))
        if gap := record_gap(path, start, event.last_update):
            self._file.append({"samples": gap[0], MISSING_TO: gap[1]})
        last, recorded = event.last_update, read_json_lines(path)
        led_here = last is not None and last.samples + last.global_batch == start
        if last and led_here and (not recorded or recorded[-1]["samples"] < last.samples):
            self.on_update(last)

    def on_update(self, event: UpdateDone) -> None:
        """Append an update."""
        line = {"samples": event.samples, "global_batch": event.global_batch, "digest": f"{event.digest:016x}"}
        self._file.append(line | ({"replaced": event.replaced} if event.replaced else {}))

    def for_branch(self) -> ConsumedFile:
        """Return the observer that writes the same file of a branch."""
        return ConsumedFile()
