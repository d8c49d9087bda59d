"""Measure the cost of exact mode: updates of `small_conv_net` with exact sums and with float32 sums.

python -m benchmarks.exact_mode; mpirun -np 2 --bind-to none python -m benchmarks.exact_mode [--turns 41]

Updates in both modes alternate in one run, over the same samples. Both use one ghost batch per micro-batch and one
thread, so that only the sums differ.
"""

from __future__ import annotations

from benchmarks.small_updates import Contestants, compare, make_updates
from hvd_batchgrow.comm.ranks import Ranks


def contestants(ranks: Ranks, num_passes: int, num_updates: int) -> Contestants:
    """Return a contestant for each mode."""
    modes = {"fast": False, "exact": True}
    return {name: make_updates(ranks, num_passes, num_updates, exact=exact)[1] for name, exact in modes.items()}


if __name__ == "__main__":
    compare(__doc__, {"ghost norms": contestants}, "fast")
