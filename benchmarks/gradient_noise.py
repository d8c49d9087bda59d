"""Measure what the measurement of the gradient noise adds to an update of the small convolutional net.

mpirun -np 2 --bind-to none python -m benchmarks.gradient_noise [--turns 41] [--updates 10] [--passes 1 5]

Updates with and without it alternate in one run, over the same samples. The table shows updates/s and their ratio in
each turn. One micro-batch and several differ: with several, the gradient of each is kept separately.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.small_updates import Contestants, compare, make_updates
from hvd_batchgrow.comm.ranks import Ranks


def contestants(ranks: Ranks, num_passes: int, num_updates: int) -> Contestants:
    """Return contestants that share one engine and differ only in whether it measures the noise."""
    engine, update = make_updates(ranks, num_passes, num_updates)
    engine.measure_noise()
    norms = engine.buckets.norms

    def contestant(*, measures: bool) -> Callable[[], int]:
        def work() -> int:
            engine.buckets.norms = norms if measures else None
            return update()

        return work

    return {"not measured": contestant(measures=False), "measured": contestant(measures=True)}


if __name__ == "__main__":
    compare(__doc__, contestants, "not measured")
