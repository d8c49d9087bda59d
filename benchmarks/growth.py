"""Measure what growth saves where all-reduces are slow: a run of growing batches and its twin, on four emulated hosts.

python -m benchmarks.growth [--rates 1gbit 100mbit] [--samples-per-s 1000 4000] [--turns 3]

Run as root; requires the programs of tests/slurm. Both runs are whole: `hvd-batchgrow train` on four ranks over
Horovod, with evaluations and checkpoints. The network has the gradient of WRN-16-4 (11 MB) and sleeps in the place of
its convolutions, so its accuracy means nothing; docs/critical-batch.md has the accuracies of both schedules.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.emulated_hosts import cluster, run_ranks
from hvd_batchgrow.results.account import account_of
from hvd_batchgrow.results.run_files import RunFiles
from tests.slurm.cluster import Cluster

HOSTS = 4
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
global_batch = 128
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
"""The batch grows once, and the learning rate decays after that: 100 updates become 44."""


def train(slurm: Cluster, folder: Path, policy: str, samples_per_s: float, name: str) -> float:
    """Train, and return the seconds of the updates: start, evaluations and checkpoints vanish in a long run."""
    job = folder / f"{policy}.toml"
    job.write_text(
        JOB.format(policy=policy, batch=SCHEDULES[policy], seconds_per_sample=1 / samples_per_s), encoding="utf-8"
    )
    run_ranks(slurm, folder, HOSTS, ["hvd-batchgrow", "train", str(job), "--name", name])
    return account_of(RunFiles.read(folder / "runs" / name)).training_s


def measure(rate: str, options: argparse.Namespace) -> None:
    """Print the seconds of both schedules for each speed of the hosts."""
    with cluster(rate) as (slurm, folder):
        slurm.start_ssh()
        for samples_per_s in options.samples_per_s:
            seconds: dict[str, list[float]] = {policy: [] for policy in SCHEDULES}
            for turn, policy in itertools.product(range(options.turns), SCHEDULES):
                name = f"{policy}-{samples_per_s:g}-{turn}"
                seconds[policy].append(train(slurm, folder, policy, samples_per_s, name))
                print(f"{name}: {seconds[policy][-1]:.1f} s", file=sys.stderr, flush=True)
            ratios = [decay / grow for decay, grow in zip(seconds["decay"], seconds["grow"], strict=True)]
            print(
                f"{rate:9} {samples_per_s:6.0f} samples/s per host   decay {statistics.median(seconds['decay']):6.1f} s"
                f"   grow {statistics.median(seconds['grow']):6.1f} s   decay / grow {statistics.median(ratios):.2f}"
                f" ({min(ratios):.2f} … {max(ratios):.2f}), n = {len(ratios)}",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each rate of the links."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="of each link, in the units of tc")
    parser.add_argument("--samples-per-s", nargs="+", type=float, default=[1000.0, 4000.0], help="of a host alone")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    if os.geteuid():
        sys.exit("benchmarks.growth makes network namespaces: run it as root")
    for rate in options.rates:
        measure(rate, options)


if __name__ == "__main__":
    main()
