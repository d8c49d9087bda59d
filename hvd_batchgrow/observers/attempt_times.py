"""The duration of each invocation, in record.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.events import Evaluation, Observer, RunEnded, RunStarted


class AttemptTimes(Observer):
    """Adds `elapsed_s` and `evaluation_s` to this invocation's entry in `record.json`.

    It writes them after each evaluation and at the end. The record of a killed invocation thus has the time up to its
    last evaluation.

    Args:
        clock: returns seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._evaluation_s = 0.0

    def on_start(self, event: RunStarted) -> None:
        """Start the clock."""
        self._path, self._begin = event.folder / "record.json", self._clock()

    def on_evaluation(self, event: Evaluation) -> None:
        """Write the time so far."""
        self._evaluation_s += event.seconds
        self._write()

    def on_end(self, event: RunEnded) -> None:
        """Write the duration."""
        self._write()

    def _write(self) -> None:
        times = {"elapsed_s": self._clock() - self._begin, "evaluation_s": self._evaluation_s}
        add_to_last_attempt(self._path, times)


def add_to_last_attempt(path: Path, values: dict[str, float]) -> None:
    """Add values to the last entry of `attempts`. A record that is missing or damaged stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    try:
        record = json.loads(read_regular(path))
        record["attempts"][-1].update(values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    write_atomically(path, (dump_json(record, indent=2) + "\n").encode())
