"""Measure the time that growth saves where all-reduces are slow, with the schedules of two papers.

python -m benchmarks.growth [smith adabatch] [--rates 1gbit 100mbit] [--samples-per-s 1000 4000] [--turns 3]

Run as root; requires the programs of tests/slurm. Each schedule is a complete run of `hvd-batchgrow train` on four
ranks, one on each of four emulated hosts, over Horovod, with evaluations and checkpoints. The network has the gradient
of WRN-16-4 (11 MB) and sleeps instead of computing convolutions, so its accuracy means nothing; docs/results.md has the
accuracies of such schedules. --samples-per-s is the speed of the sleep alone. Gradients and Python take time too, so
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
num_samples = 12800
shape = [4, 4, 1]
[model]
name = "benchmarks.sleeping:SleepingNetwork"
ghost_batch = 32
kwargs = {{ seconds_per_sample = {seconds_per_sample!r} }}
[optim]
name = "sgd"
lr = 0.1
[schedule]
{schedule}
[layout]
max_micro_batch = 128
[evaluation]
every_epochs = 0.5
[logging]
tensorboard = false
"""
_SMITH = f"epochs = 1.0\nboundaries_epochs = [0.3, 0.6, 0.8]\nnoise_factor = 5.0\nglobal_batch = {BATCH}\n"
_ADABATCH = 'policy = "adabatch"\nepochs = 1.2\nevery_epochs = 0.2\n'
SCHEDULES = {
    "smith": {"decay": f'{_SMITH}policy = "decay"', "grow": f'{_SMITH}policy = "grow"\nmax_batch = 640'},
    "adabatch": {
        "small": f"{_ADABATCH}global_batch = {BATCH}\nbatch_factor = 1\nlr_factor = 0.375",
        "grow": f"{_ADABATCH}global_batch = {BATCH}\nbatch_factor = 2\nlr_factor = 0.75\nmax_batch = 4096",
        "large": f"{_ADABATCH}global_batch = 4096\nbatch_factor = 1\nlr_factor = 0.375",
    },
}
"""Lines of [schedule]. Smith et al. 2018, §5.1, shortened to 12,800 samples: the batch grows once, to 640, and then the
learning rate decays, so 100 updates become 44. AdaBatch (Devarakonda et al. 2017), six phases in 15,360 samples: the
batch grows from 128 to 4,096, and 120 updates become 40."""


def train(slurm: Cluster, folder: Path, schedule: str, samples_per_s: float, name: str) -> float:
    """Train, and return the seconds of the updates: start, evaluations and checkpoints vanish in a long run."""
    job = folder / f"{name}.toml"
    job.write_text(JOB.format(schedule=schedule, seconds_per_sample=1 / samples_per_s))
    run_ranks(slurm, folder, HOSTS, ["hvd-batchgrow", "train", str(job), "--name", name])
    return account_of(RunFiles.read(folder / "runs" / name)).training_s


def speed_alone(samples_per_s: float, num_micro_batches: int = 11) -> float:
    """Return the median samples/s of forward and backward passes over a host's part of the first batch."""
    torch.set_num_threads(1)
    network, inputs = SleepingNetwork(1 / samples_per_s), torch.zeros(BATCH // HOSTS, 4, 4)
    speeds = []
    for _ in range(num_micro_batches):
        begin = time.perf_counter()
        network(inputs).sum().backward()
        speeds.append(len(inputs) / (time.perf_counter() - begin))
    return statistics.median(speeds[1:])


def measure(paper: str, rate: str, options: argparse.Namespace) -> None:
    """Print the median seconds of a paper's schedules, and of the ratios of each turn to the first of them."""
    with cluster(rate) as (slurm, folder):
        slurm.start_ssh()
        for samples_per_s in options.samples_per_s:
            alone = speed_alone(samples_per_s)
            print(f"{paper}, {rate}, {samples_per_s:.0f} samples/s per host, {alone:.0f} measured", flush=True)
            seconds: dict[str, list[float]] = {name: [] for name in SCHEDULES[paper]}
            for turn in range(options.turns):
                for k in range(len(seconds)):  # each turn begins with another schedule
                    name = list(seconds)[(k + turn) % len(seconds)]
                    run = f"{name}-{samples_per_s:g}-{turn}"
                    seconds[name].append(train(slurm, folder, SCHEDULES[paper][name], samples_per_s, run))
                    print(f"{run}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
            first = next(iter(seconds))
            for name, values in seconds.items():
                ratios = [before / now for before, now in zip(seconds[first], values, strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
                print(f"  {name:6} {statistics.median(values):6.1f} s   {first} / {name} {spread}, n = {len(ratios)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each paper's schedules at each rate of the links."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("papers", nargs="*", metavar="PAPER", help=f"of {', '.join(SCHEDULES)}; by default all")
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
    if unknown := set(options.papers) - SCHEDULES.keys():
        parser.error(f"no schedules of {', '.join(sorted(unknown))}; known: {', '.join(SCHEDULES)}")
    for paper in options.papers or SCHEDULES:
        for rate in options.rates:
            measure(paper, rate, options)


if __name__ == "__main__":
    main()
