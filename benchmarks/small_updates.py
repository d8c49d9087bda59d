"""Updates of `small_conv_net`, for benchmarks that compare two kinds of updates."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.turns import print_rates, take_turns
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.networks import small_conv_net
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch

GHOST_BATCH = 64

Contestants = Mapping[str, Callable[[], int]]


def compare(
    description: str | None, makes: Mapping[str, Callable[[Ranks, int, int], Contestants]], reference: str
) -> None:
    """Print the rates of contestants on rank 0, for each network and number of micro-batches.

    Args:
        description: of the command.
        makes: for each kind of network, a function from ranks, micro-batches of an update and updates of a turn to
            contestants.
        reference: the contestant to which the others are compared.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--updates", type=int, default=10, help="per turn")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 5], help="micro-batches of an update on each rank")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, which other work disturbs less")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    ranks = connect("auto")
    for network, num_micro_batches in itertools.product(makes, options.passes):
        rates = take_turns(makes[network](ranks, num_micro_batches, options.updates), options.turns, clock=clock)
        if ranks.rank == 0:
            print(
                f"{network}, ranks: {ranks.size}, micro-batches of {GHOST_BATCH} samples on each: {num_micro_batches}"
            )
            print_rates(rates, "updates/s", reference)
    ranks.close()


def make_updates(
    ranks: Ranks,
    num_micro_batches: int,
    num_updates: int,
    *,
    ghost_batches_per_micro_batch: int = 1,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[UpdateEngine, Callable[[], int]]:
    """Return an engine, and a function that does some updates with it and returns their number.

    Args:
        ranks: share an update.
        num_micro_batches: micro-batches of an update on each rank.
        num_updates: of a call of the function.
        ghost_batches_per_micro_batch: ghost batches of a micro-batch of `GHOST_BATCH` samples.
        change: replaces modules of the network.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(GHOST_BATCH, 1, 28, 28), torch.randint(10, (GHOST_BATCH,))
    num_ghost_batches = num_micro_batches * ghost_batches_per_micro_batch * ranks.size
    batch = num_micro_batches * ranks.size * GHOST_BATCH
    phase = Phase(0.0, 0.01, 0.9, batch, float(batch), start_samples=0, num_updates=num_updates)
    model = change(
        small_conv_net.build(1, 10, ghost_batch=GHOST_BATCH // ghost_batches_per_micro_batch, bn_momentum=0.1)
    )
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), ranks)

    def work() -> int:
        for _ in range(num_updates):
            firsts = ((k * ranks.size + ranks.rank) * ghost_batches_per_micro_batch for k in range(num_micro_batches))
            passes = (MicroBatch(images, labels, tuple(range(k, k + ghost_batches_per_micro_batch))) for k in firsts)
            engine.update(passes, num_micro_batches, phase, num_ghost_batches)
        return num_updates

    return engine, work
