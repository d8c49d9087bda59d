"""metrics.jsonl: one line per training record and per evaluation."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from hvd_batchgrow.train.events import Evaluation, Observer, RunEnded, RunStarted, TrainRecord


class MetricsFile(Observer):
    """Appends to `metrics.jsonl`; on a resume, lines beyond the checkpoint are taken out first."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_start(self, event: RunStarted) -> None:
        """Open the file, without what will be done again."""
        path = event.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["samples"] <= event.samples and event.samples]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def on_record(self, event: TrainRecord) -> None:
        """Append a training record."""
        self._append({"kind": "train", **asdict(event)})

    def on_evaluation(self, event: Evaluation) -> None:
        """Append an evaluation."""
        self._append({"kind": "eval", **asdict(event)})

    def on_end(self, event: RunEnded) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out. No file: no lines."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
