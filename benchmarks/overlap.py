"""Measure how much of the all-reduces the backward pass hides, on 1, 2 and 4 emulated hosts.

python -m benchmarks.overlap [--rates 1gbit 100mbit] [--compute-ms 100 300] [--passes 1 4] [--turns 5]

Run as root; requires the programs of tests/slurm. All hosts are on this machine and would share its cores, so each
layer sleeps instead of computing its convolution: a third of its time in the forward pass, two thirds in the backward
pass. The gradient has the tensors of WRN-16-4 (2.7 million numbers). Efficiency is the updates/s relative to
one host.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.emulated_hosts import cluster, run_ranks
from benchmarks.sleeping import NUM_CLASSES, SleepingNetwork
from benchmarks.turns import take_turns
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.malloc_tuning import keep_freed_memory
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.gradients import GradientBuckets, bucket_size

HOSTS = (1, 2, 4)
OVERLAPPED, EXACT, AFTER = "hvd_batchgrow", "… in exact mode", "… after the backward"
DDP, DDP_SMALL = "DDP over Gloo, no_sync", "… with buckets of 1.4 MB"
NUM_SAMPLES = 8
"""Samples of a micro-batch, which is one ghost batch."""


def work(seconds: float, num_micro_batches: int, turns: int) -> None:
    """Be one rank; rank 0 prints the updates/s of each contestant and turn as JSON."""
    keep_freed_memory()
    torch.set_num_threads(1)
    ranks = connect()
    torch.distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.size)
    contestants = {
        OVERLAPPED: engine(ranks, seconds, num_micro_batches, GradientBuckets),
        EXACT: engine(ranks, seconds, num_micro_batches, GradientBuckets, exact=True),
        AFTER: engine(ranks, seconds, num_micro_batches, AfterBackward),
        DDP: by_ddp(seconds, num_micro_batches, bucket_mib=25),
        DDP_SMALL: by_ddp(
            seconds, num_micro_batches, bucket_mib=bucket_size([*SleepingNetwork(0.0).parameters()]) / 2**20
        ),
    }
    rates = take_turns(contestants, turns)
    if ranks.rank == 0:
        print(json.dumps(rates), flush=True)
    torch.distributed.destroy_process_group()
    ranks.close()


class AfterBackward(GradientBuckets):
    """Buckets whose all-reduces begin only after the backward pass."""

    def start_when_ready(self, divisor: float) -> None:
        """Begin no all-reduce during the backward pass."""
        super().start_when_ready(divisor)
        self._armed = False


UPDATES = 4
"""Of a turn."""


def samples() -> tuple[Tensor, Tensor]:
    """Return the input (n, classes) and the labels (n,) of a micro-batch."""
    return torch.zeros(NUM_SAMPLES, NUM_CLASSES), torch.zeros(NUM_SAMPLES, dtype=torch.int64)


def engine(
    ranks: Ranks, seconds: float, num_micro_batches: int, buckets: type[GradientBuckets], *, exact: bool = False
) -> Callable[[], int]:
    """Return the contestant of this package's update engine."""
    model = SleepingNetwork(seconds / NUM_SAMPLES)
    found = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), ranks, exact=exact)
    found.buckets = buckets(model.parameters(), ranks, exact=exact)
    inputs, labels = samples()
    num_ghost_batches = num_micro_batches * ranks.size
    batch = NUM_SAMPLES * num_ghost_batches
    phase = Phase(0.0, 1e-4, 0.9, batch, float(batch), start_samples=0, num_updates=1)

    def run() -> int:
        for _ in range(UPDATES):
            slots = range(ranks.rank, num_ghost_batches, ranks.size)
            found.update(
                (MicroBatch(inputs, labels, (slot,)) for slot in slots), num_micro_batches, phase, num_ghost_batches
            )
        return UPDATES

    return run


def by_ddp(seconds: float, num_micro_batches: int, *, bucket_mib: float) -> Callable[[], int]:
    """Return the contestant of DistributedDataParallel, with buckets of its default of 25 MiB or of another size."""
    network = SleepingNetwork(seconds / NUM_SAMPLES)
    model = nn.parallel.DistributedDataParallel(network, bucket_cap_mb=bucket_mib)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    inputs, labels = samples()

    def backward() -> None:
        nn.functional.cross_entropy(model(inputs), labels).backward()

    def run() -> int:
        for _ in range(UPDATES):
            with model.no_sync():
                for _ in range(num_micro_batches - 1):
                    backward()
            backward()
            optimizer.step()
            optimizer.zero_grad()
        return UPDATES

    return run


def measure(rate: str, options: argparse.Namespace) -> None:
    """Print the table of a network."""
    with cluster(rate) as (slurm, folder):
        slurm.start_ssh()
        for compute_ms, passes in itertools.product(options.compute_ms, options.passes):
            alone: dict[str, float] = {}
            for hosts in HOSTS:
                group = {"MASTER_ADDR": slurm.nodes[0], "MASTER_PORT": "29511"}
                group |= {"HOROVOD_CYCLE_TIME": str(options.horovod_cycle_ms)}
                words = ["python", "-m", "benchmarks.overlap", "--as-rank", str(compute_ms / 1000), str(passes)]
                printed = run_ranks(slurm, folder, hosts, [*words, "--turns", str(options.turns)], group)
                rates = json.loads(printed.splitlines()[-1])
                alone = alone or {name: statistics.median(values) for name, values in rates.items()}
                for name, values in rates.items():
                    shares = [value / alone[name] for value in values]
                    print(
                        f"{rate:9} {compute_ms:5.0f} ms × {passes:<3} {hosts:3} hosts  {name:24} "
                        f"{statistics.median(values):8.2f} updates/s   efficiency {statistics.median(shares):.3f} "
                        f"({min(shares):.3f} … {max(shares):.3f})",
                        flush=True,
                    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["1gbit"], help="of each network link, in the units of tc")
    parser.add_argument("--compute-ms", nargs="+", type=float, default=[100.0, 300.0], help="of a pass")
    parser.add_argument("--passes", nargs="+", type=int, default=[1, 4], help="of an update")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--horovod-cycle-ms", type=float, default=1.0)
    parser.add_argument("--as-rank", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_rank:
        work(float(options.as_rank[0]), int(options.as_rank[1]), options.turns)
        return
    if os.geteuid():
        sys.exit("benchmarks.overlap makes network namespaces: run it as root")
    for rate in options.rates:
        measure(rate, options)


if __name__ == "__main__":
    main()
