"""Measure what the measurement of the gradient noise adds to an update of the small convolutional net.

mpirun -np 2 --bind-to none python -m benchmarks.gradient_noise [--turns 41] [--updates 10] [--passes 1 5]

Updates with and without it alternate in one run, over the same samples. The table shows updates/s and their ratio in
each turn. One micro-batch and several differ: with several, the gradient of each is kept separately.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.turns import print_rates, take_turns
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.networks.small_conv_net import SmallConvNet
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch

GHOST_BATCH = 64


def main() -> None:
    """Print the rates on rank 0, for each number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--updates", type=int, default=10, help="per turn")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 5], help="micro-batches of an update on each rank")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = connect("auto")
    for num_passes in options.passes:
        rates = take_turns(contestants(ranks, num_passes, options.updates), options.turns)
        if ranks.rank == 0:
            print(f"ranks: {ranks.size}, micro-batches of {GHOST_BATCH} samples on each: {num_passes}")
            print_rates(rates, "updates/s", "not measured")
    ranks.close()


def contestants(ranks: Ranks, num_passes: int, num_updates: int) -> dict[str, Callable[[], int]]:
    """Return contestants that share one engine and differ only in whether it measures the noise."""
    torch.manual_seed(0)
    images, labels = torch.randn(GHOST_BATCH, 1, 28, 28), torch.randint(10, (GHOST_BATCH,))
    num_groups = num_passes * ranks.size
    batch = num_groups * GHOST_BATCH
    phase = Phase(0.0, 0.01, 0.9, batch, float(batch), start_samples=0, num_updates=num_updates)
    model = SmallConvNet(1, 10, (16, 32, 32, 64, 64), GHOST_BATCH, 0.1)
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), ranks)
    engine.measure_noise()
    norms = engine.buckets.norms

    def contestant(*, measures: bool) -> Callable[[], int]:
        def work() -> int:
            engine.buckets.norms = norms if measures else None
            for _ in range(num_updates):
                passes = (MicroBatch(images, labels, (k * ranks.size + ranks.rank,)) for k in range(num_passes))
                engine.update(passes, num_passes, phase, num_groups)
            return num_updates

        return work

    return {"not measured": contestant(measures=False), "measured": contestant(measures=True)}


if __name__ == "__main__":
    main()
