"""The observer that makes `hvd-batchgrow train` work in turns."""

from __future__ import annotations

import os

from benchmarks.cpu.contestant import wait_for_turn
from hvd_batchgrow.train.events import Observer, UpdateDone

UPDATES = "BENCHMARK_UPDATES"
"""Variable with the updates of a turn."""


class Pausing(Observer):
    """Waits after the updates of a turn. The first turn is one update."""

    def __init__(self) -> None:
        self._left, self._updates = 1, int(os.environ[UPDATES])

    def on_update(self, event: UpdateDone) -> None:
        """Count an update."""
        self._left -= 1
        if not self._left:
            if not wait_for_turn():
                os._exit(0)  # the benchmark is over
            self._left = self._updates
