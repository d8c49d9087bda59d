"""Observers that tests name in job files as a user would."""

from __future__ import annotations

from hvd_batchgrow.train.events import Evaluation, Observer, RunEnded, RunStarted, TrainRecord


class Lines(Observer):
    """Writes a line per event into `lines.txt` of the run folder."""

    def on_start(self, event: RunStarted) -> None:
        self.path = event.folder / "lines.txt"
        self._add(f"start {event.samples}")

    def on_record(self, event: TrainRecord) -> None:
        self._add(f"record {event.samples}")
        event.metrics.clear()  # a copy

    def on_evaluation(self, event: Evaluation) -> None:
        self._add(f"evaluation {event.samples} {sorted(event.metrics)}")
        event.metrics.clear()

    def on_end(self, event: RunEnded) -> None:
        self._add(f"end {event.samples}")

    def _add(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")


class Unreachable(Lines):
    """Fails at the second record."""

    def on_record(self, event: TrainRecord) -> None:
        if event.updates > 3:
            raise ConnectionError("no route to host")
        super().on_record(event)


class NeedsFile(Observer):
    """Raises an exception in its constructor."""

    def __init__(self) -> None:
        raise FileNotFoundError("token.txt")


class Misspelt(Observer):
    """Has a method that no event would call."""

    def on_evalution(self, event: Evaluation) -> None: ...


def not_an_observer() -> dict[str, int]:
    return {}
