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
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import job_of
from benchmarks.emulated_hosts import cluster
from benchmarks.turns import take_turns
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.malloc_tuning import keep_freed_memory
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.gradients import GradientBuckets

HOSTS = (1, 2, 4)
OVERLAPPED, AFTER, DDP = "hvd_batchgrow", "… after the backward", "DDP over Gloo, no_sync"
NUM_SAMPLES, NUM_CLASSES = 8, 10
"""Samples of a micro-batch, which is one ghost batch: they cost nothing."""


class Sleep(torch.autograd.Function):
    """A layer that takes time and no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, *weights: Tensor) -> Tensor:
        """Sleep a third of the seconds, and return x."""
        ctx.seconds = seconds
        ctx.save_for_backward(*weights)
        time.sleep(seconds / 3)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Sleep two thirds of the seconds, and return zeros as the gradients of the weights."""
        time.sleep(2 * ctx.seconds / 3)
        return grads[0], None, *map(torch.zeros_like, ctx.saved_tensors)


class SleepingNetwork(nn.Module):
    """The parameters of WRN-16-4, whose layers share the time of a pass evenly."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        job = job_of(
            "overlap", "cpu", NUM_SAMPLES, model={"name": "wrn_16_4", "ghost_batch": NUM_SAMPLES},
            data={"source": "synthetic_images", "num_samples": 10**6, "shape": [32, 32, 3]},
        )  # fmt: skip
        network = build_model(job, (32, 32, 3), NUM_CLASSES)
        layers = [list(module.parameters(recurse=False)) for module in network.modules()]
        self.layers = nn.ModuleList(nn.ParameterList(layer) for layer in layers if layer)
        self.seconds = seconds / len(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes) that depend on all parameters, as autograd sees it."""
        y = x.clone().requires_grad_()
        for layer in self.layers:
            y = Sleep.apply(y, self.seconds, *layer.parameters())  # type: ignore[no-untyped-call]
        return y


def work(seconds: float, num_passes: int, turns: int) -> None:
    """Be one rank; rank 0 prints the updates/s of each contestant and turn as JSON."""
    keep_freed_memory()
    torch.set_num_threads(1)
    ranks = connect()
    torch.distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.size)
    contestants = {
        OVERLAPPED: engine(ranks, seconds, num_passes, GradientBuckets),
        AFTER: engine(ranks, seconds, num_passes, AfterBackward),
        DDP: by_ddp(seconds, num_passes),
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


def engine(ranks: Ranks, seconds: float, num_passes: int, buckets: type[GradientBuckets]) -> Callable[[], int]:
    """Return the contestant of this package's update engine."""
    model = SleepingNetwork(seconds)
    found = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), ranks)
    found.buckets = buckets(model.parameters(), ranks)
    inputs, labels = samples()
    num_groups = num_passes * ranks.size
    batch = NUM_SAMPLES * num_groups
    phase = Phase(0.0, 1e-4, 0.9, batch, float(batch), start_samples=0, num_updates=1)

    def run() -> int:
        for _ in range(UPDATES):
            slots = range(ranks.rank, num_groups, ranks.size)
            found.update((MicroBatch(inputs, labels, (slot,)) for slot in slots), num_passes, phase, num_groups)
        return UPDATES

    return run


def by_ddp(seconds: float, num_passes: int) -> Callable[[], int]:
    """Return the contestant of DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(SleepingNetwork(seconds))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    inputs, labels = samples()

    def backward() -> None:
        nn.functional.cross_entropy(model(inputs), labels).backward()

    def run() -> int:
        for _ in range(UPDATES):
            with model.no_sync():
                for _ in range(num_passes - 1):
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
                names = ",".join(f"{node}:1" for node in slurm.nodes[:hosts])
                kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")
                group = {"MASTER_ADDR": slurm.nodes[0], "MASTER_PORT": "29511"}
                group |= {"HOROVOD_CYCLE_TIME": str(options.horovod_cycle_ms)}
                words = ["mpirun", "-np", str(hosts), "-H", names, "--bind-to", "none"]
                words += [word for name in kept for word in ("-x", name)]
                words += [word for name, value in group.items() for word in ("-x", f"{name}={value}")]
                words += ["python", "-m", "benchmarks.overlap", "--as-rank", str(compute_ms / 1000), str(passes)]
                done = slurm.hosts.run("n1", *words, "--turns", str(options.turns), cwd=folder, timeout_s=500)
                if done.returncode:
                    raise SystemExit(done.stdout + done.stderr)
                rates = json.loads(done.stdout.splitlines()[-1])
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
