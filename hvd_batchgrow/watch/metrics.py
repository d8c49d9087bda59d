"""metrics.jsonl: one line per training record and per evaluation."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvd_batchgrow.train.events import Evaluation, Observer, RunStarted, TrainRecord


class MetricsFile(Observer):
    """Appends to `metrics.jsonl`; on a resume, lines beyond the checkpoint are taken out first."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_start(self, event: RunStarted) -> None:
        """Keep of an earlier life what will not be done again."""
        self._path = event.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["samples"] <= event.samples and event.samples]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def on_record(self, event: TrainRecord) -> None:
        """Append a training record."""
        self._append({"kind": "train", **asdict(event)})

    def on_evaluation(self, event: Evaluation) -> None:
        """Append an evaluation."""
        self._append({"kind": "eval", **asdict(event)})

    def _append(self, line: dict[str, Any]) -> None:
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


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
