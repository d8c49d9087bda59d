"""Measure the time that growth saves where all-reduces are slow: a run whose batch grows and one whose rate decays.

python -m benchmarks.growth [--rates 1gbit 100mbit] [--samples-per-s 1000 4000] [--turns 3]

Run as root; requires the programs of tests/slurm. Both are complete runs of `hvd-batchgrow train` on four ranks, one on
each of four emulated hosts, over Horovod, with evaluations and checkpoints. The network has the gradient of WRN-16-4
(11 MB) and sleeps instead of computing convolutions, so its accuracy means nothing; docs/critical-batch.md has the
accuracies of both schedules. --samples-per-s is the speed of the sleep alone. Gradients and Python take time too, so
the speed of a process without all-reduces and optimizer is measured and printed as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.emulated_hosts import cluster, run_ranks
from benchmarks.sleeping import SleepingNetwork
from hvd_batchgrow.results.account import account_of
from hvd_batchgrow.results.run_files import RunFiles
from tests.slurm.cluster import Cluster

HOSTS, BATCH = 4, 128
JOB = """\
name = "growth"
[data]
source = "synthetic_images"
num_samples = 1280
shape = [4, 4, 1]
[model]
name = "benchmarks.sleeping:SleepingNetwork"
ghost_batch = 32
kwargs = {{ seconds_per_sample = {seconds_per_sample!r} }}
[optim]
name = "sgd"
lr = 0.1
[schedule]
policy = "{policy}"
epochs = 10.0
global_batch = {global_batch}
boundaries_epochs = [3.0, 6.0, 8.0]
noise_factor = 5.0
{batch}
[layout]
max_micro_batch = 128
[evaluation]
every_epochs = 5.0
[logging]
tensorboard = false
"""
"""Smith et al. 2018, §5.1, shortened to 10 of 200 epochs: the boundaries are at 30, 60 and 80 % of the samples."""
SCHEDULES = {"grow": "max_batch = 640", "decay": ""}
"""Lines of [schedule] by policy. The batch grows once, to 640, and then the learning rate decays: 100
updates become 44."""


def train(slurm: Cluster, folder: Path, policy: str, samples_per_s: float, name: str) -> float:
    """Train, and return the seconds of the updates: start, evaluations and checkpoints vanish in a long run."""
    job = folder / f"{policy}.toml"
    job.write_text(
        JOB.format(policy=policy, batch=SCHEDULES[policy], global_batch=BATCH, seconds_per_sample=1 / samples_per_s),
        encoding="utf-8",
    )
    run_ranks(slurm, folder, HOSTS, ["hvd-batchgrow", "train", str(job), "--name", name])
    return account_of(RunFiles.read(folder / "runs" / name)).training_s


def speed_alone(samples_per_s: float, num_passes: int = 11) -> float:
    """Return the median samples/s of forward and backward passes over a host's part of the first batch."""
    torch.set_num_threads(1)
    network, inputs = SleepingNetwork(1 / samples_per_s), torch.zeros(BATCH // HOSTS, 4, 4)
    speeds = []
    for _ in range(num_passes):
        begin = time.perf_counter()
        network(inputs).sum().backward()
        speeds.append(len(inputs) / (time.perf_counter() - begin))
    return statistics.median(speeds[1:])


def measure(rate: str, options: argparse.Namespace) -> None:
    """Print the median seconds of both schedules, and of the ratios of each turn, for each speed of the hosts."""
    with cluster(rate) as (slurm, folder):
        slurm.start_ssh()
        for samples_per_s in options.samples_per_s:
            alone = speed_alone(samples_per_s)
            seconds: dict[str, list[float]] = {policy: [] for policy in SCHEDULES}
            for turn in range(options.turns):
                for policy in sorted(SCHEDULES, reverse=turn % 2 == 1):  # each is first in half of the turns
                    name = f"{policy}-{samples_per_s:g}-{turn}"
                    seconds[policy].append(train(slurm, folder, policy, samples_per_s, name))
                    print(f"{name}: {seconds[policy][-1]:.1f} s", file=sys.stderr, flush=True)
            ratios = [decay / grow for decay, grow in zip(seconds["decay"], seconds["grow"], strict=True)]
            medians = {policy: statistics.median(values) for policy, values in seconds.items()}
            print(
                f"{rate:9} {samples_per_s:6.0f} samples/s per host, {alone:.0f} measured"
                f"   decay {medians['decay']:6.1f} s   grow {medians['grow']:6.1f} s"
                f"   decay / grow {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
                f", n = {len(ratios)}",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each rate of the links."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rates",
        nargs="+",
        default=["1gbit", "100mbit"],
        help="of each link, in the units of tc; default: 1gbit 100mbit",
    )
    parser.add_argument(
        "--samples-per-s",
        nargs="+",
        type=float,
        default=[1000.0, 4000.0],
        help="of the sleep of a host; default: 1000 4000",
    )
    parser.add_argument("--turns", type=int, default=3, help="runs of each schedule; default: 3")
    options = parser.parse_args(arguments)
    if os.geteuid():
        sys.exit("benchmarks.growth makes network namespaces: run it as root")
    for rate in options.rates:
        measure(rate, options)


if __name__ == "__main__":
    main()
