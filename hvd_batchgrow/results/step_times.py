"""Step times of a run, from its records."""

from __future__ import annotations

import numpy as np

from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.schedule.cost.time_left import TimeLeft


def recorded_times(run: RunFiles) -> TimeLeft:
    """Return the step times on record, by the samples of an update per rank."""
    times = TimeLeft()
    updates, seconds = np.diff(run.column("updates"), prepend=0.0), run.record_seconds
    sizes = run.column("global_batch") / run.column("ranks")
    for size, number, spent in zip(sizes.tolist(), updates.tolist(), seconds.tolist(), strict=True):
        if np.isfinite(size) and size > 0 and number > 0 and 0 < spent < np.inf:
            times.add(size, int(number), spent)
    return times
