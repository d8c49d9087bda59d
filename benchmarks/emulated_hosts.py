"""Compare a chain of Slurm jobs with holding the peak nodes, and measure scaling over four hosts at 1 Gbit/s.

python -m benchmarks.emulated_hosts chain|scaling [--turns 5] [--rate 1gbit]

Run as root; requires the programs of tests/slurm. The hosts are emulated on this machine and share its cores: four
ranks on two cores cannot compute faster than two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[1]
NUM_HOSTS = 4
JOB = """\
name = "chain"
[data]
source = "fashion_mnist"
[model]
name = "small_conv_net"
ghost_batch = 64
[optim]
name = "sgd"
lr = 0.1
[schedule]
policy = "grow"
epochs = 3.0
global_batch = 128
boundaries_epochs = [1.0, 2.0]
noise_factor = 2.0
[layout]
grow_by = "ranks"
ranks_per_phase = [1, 2, 4]
max_micro_batch = 128
threads_per_rank = 1
[evaluation]
every_epochs = 3.0
[logging]
tensorboard = false
"""


@contextmanager
def cluster(rate: str) -> Iterator[tuple[Cluster, Path]]:
    """Yield a cluster of four nodes with network links of a rate, and a folder that all nodes share."""
    base = ROOT / "build"
    base.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=base))
    own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_", "PMI"))}
    environment = own | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    try:
        with Cluster(NUM_HOSTS, folder / "cluster", environment) as slurm:
            for node in slurm.nodes:
                limit = f"root tbf rate {rate} burst 256kb latency 50ms"
                slurm.run("tc", "qdisc", "add", "dev", f"to-{node}", *limit.split()).check_returncode()
                slurm.hosts.run(node, "tc", "qdisc", "add", "dev", "eth0", *limit.split()).check_returncode()
            yield slurm, folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_ranks(
    slurm: Cluster, folder: Path, num_hosts: int, command: Sequence[str], variables: Mapping[str, str] | None = None
) -> str:
    """Run a command as one rank on each of the first hosts, and return its standard output.

    Args:
        slurm: the cluster, with sshd on its hosts.
        folder: working directory.
        num_hosts: number of hosts, and of ranks.
        command: program and arguments of each rank.
        variables: environment variables, in addition to those of `cluster`.

    Raises:
        SystemExit: the command fails; has its output.
        TimeoutExpired: the command runs for more than an hour. The end of the cluster kills it.
    """
    hosts = ",".join(f"{node}:1" for node in slurm.nodes[:num_hosts])
    words = ["mpirun", "-np", str(num_hosts), "-H", hosts, "--bind-to", "none"]
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", *(f"{name}={value}" for name, value in (variables or {}).items()))
    words += [word for name in kept for word in ("-x", name)]
    done = slurm.hosts.run("n1", *words, *command, cwd=folder, timeout_s=3600)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


# --- the chain ------------------------------------------------------------------------------------------


def compare_chain(rate: str) -> None:
    """Probe, predict, run both variants, and print the time and node-seconds of each."""
    with cluster(rate) as (slurm, folder):
        (folder / "chain.toml").write_text(JOB)
        for nodes in (1, 2, 4):
            probe = "srun --mpi=pmix hvd-batchgrow probe chain.toml --out PROBE.json --budget-s 15"
            _finish(slurm, folder, f"--nodes={nodes}", "--ntasks-per-node=1", f"--wrap={probe}")
        planned = slurm.run(
            "hvd-batchgrow", "plan", "chain.toml", "--ranks", "4", "--cost", "PROBE.json", "--json", cwd=folder
        )
        planned.check_returncode()
        cost = json.loads(planned.stdout)["cost"]
        print(json.dumps({key: value for key, value in cost.items() if not isinstance(value, list)}, indent=1))
        done = slurm.run("hvd-batchgrow", "submit", "chain.toml", "--nodes-max", "4", cwd=folder)
        done.check_returncode()
        ids = [int(number) for number in re.findall(r": job (\d+)", done.stdout)]
        links = [_ended(slurm, number) for number in ids]
        held = _finish(slurm, folder, "--nodes=4", str(ROOT / "slurm/train.sbatch"), "chain.toml", "--name", "held")
        _print_ways({"chain 1 → 2 → 4": links, "4 nodes held": [held]})
        for name in ("chain", "held"):
            lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
            _print_phases(name, [json.loads(line) for line in lines])


def _finish(slurm: Cluster, folder: Path, *words: str) -> dict[str, str]:
    done = slurm.run("sbatch", "--parsable", *words, cwd=folder)
    done.check_returncode()
    return _ended(slurm, int(done.stdout))


def _ended(slurm: Cluster, number: int) -> dict[str, str]:
    job = slurm.wait_for(number, timeout_s=600)
    if job["JobState"] != "COMPLETED":
        raise SystemExit(f"job {number} ended as {job['JobState']}: see {job.get('StdOut')}")
    return job


def _print_ways(ways: dict[str, list[dict[str, str]]]) -> None:
    print(f"\n{'':20} {'seconds':>8} {'in jobs':>8} {'node-seconds':>13}")
    for name, jobs in ways.items():
        spans = [tuple(datetime.fromisoformat(job[key]) for key in ("StartTime", "EndTime")) for job in jobs]
        in_jobs = [(end - start).total_seconds() for start, end in spans]
        whole = (spans[-1][1] - spans[0][0]).total_seconds()
        nodes = [int(job["NumNodes"].split("-")[0]) for job in jobs]
        node_s = sum(count * seconds for count, seconds in zip(nodes, in_jobs, strict=True))
        print(f"{name:20} {whole:8.0f} {sum(in_jobs):8.0f} {node_s:13.0f}")


def _print_phases(name: str, lines: list[dict[str, Any]]) -> None:
    for phase in (0, 1, 2):
        records = [line for line in lines if line["kind"] == "train" and line["phase"] == phase]
        rate = statistics.median(record["samples_per_s"] for record in records)
        print(f"{name}: phase {phase + 1}, {records[0]['ranks']} ranks: {rate:,.0f} samples/s (median of records)")


# --- scaling --------------------------------------------------------------------------------------------


def compare_scaling(rate: str, turns: int) -> None:
    """Print samples/s of 1, 2 and 4 hosts with equal micro-batches, with overlapped all-reduces and without."""
    with cluster(rate) as (slurm, folder):
        slurm.start_ssh()
        print(f"{'network':16} {'hosts':>5} {'overlapped':>24} {'after the backward':>24}")
        for model, micro_batch in (("small_conv_net", 128), ("wrn_16_4", 32)):
            for hosts in (1, 2, 4):
                words = ["python", "-m", "benchmarks.emulated_hosts", "worker", "--turns", str(turns)]
                words += ["--model", model, "--micro-batch", str(micro_batch)]
                printed = run_ranks(slurm, folder, hosts, words)
                shown = [
                    f"{statistics.median(rates):,.0f} ({min(rates):,.0f} … {max(rates):,.0f})"
                    for rates in json.loads(printed.splitlines()[-1])
                ]
                print(f"{model:16} {hosts:5} {shown[0]:>24} {shown[1]:>24}", flush=True)


def work(model_name: str, micro_batch: int, turns: int) -> None:
    """Run a rank of the scaling measurement. Rank 0 prints samples/s of each turn, for both variants."""
    import torch

    from benchmarks.overlap import AfterBackward
    from hvd_batchgrow.comm.backend import connect
    from hvd_batchgrow.job_file import parse_job
    from hvd_batchgrow.nn.build import build_model
    from hvd_batchgrow.schedule.phases import Phase
    from hvd_batchgrow.train.malloc_tuning import keep_freed_memory
    from hvd_batchgrow.train.update.engine import UpdateEngine
    from hvd_batchgrow.train.update.forward import MicroBatch
    from hvd_batchgrow.train.update.gradients import GradientBuckets

    keep_freed_memory()
    torch.set_num_threads(1)
    ranks = connect()
    job = parse_job(
        {
            "name": "scaling",
            "data": {"source": "synthetic_images", "shape": [32, 32, 3], "num_samples": 10**6},
            "model": {"name": model_name, "ghost_batch": 32},
            "optim": {"name": "sgd", "lr": 1e-4},
            "schedule": {"policy": "decay", "epochs": 1.0, "global_batch": 128},
        }
    )
    generator = torch.Generator().manual_seed(ranks.rank)
    images, labels = torch.randn(micro_batch, 3, 32, 32, generator=generator), torch.zeros(micro_batch).long()
    phase = Phase(0.0, 1e-4, 0.9, micro_batch * ranks.size, micro_batch * ranks.size, start_samples=0, num_updates=1)
    groups = micro_batch // 32
    slots = tuple(range(ranks.rank, groups * ranks.size, ranks.size))
    rates: list[list[float]] = []
    engines = []
    for buckets in (GradientBuckets, AfterBackward):
        torch.manual_seed(0)
        model = build_model(job, (32, 32, 3), 10)
        engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), ranks)
        engine.buckets = buckets(model.parameters(), ranks, bucket_bytes=4 << 20)
        engines.append(engine)
        rates.append([])
    pairs = [*zip(engines, rates, strict=True)]
    for turn in range(turns + 1):
        for engine, found in pairs[:: -1 if turn % 2 else 1]:  # each is first in half of the turns
            begin = time.perf_counter()
            for _ in range(updates := 8 if model_name == "small_conv_net" else 3):
                engine.update(iter([MicroBatch(images, labels, slots)]), 1, phase, groups * ranks.size)
            if turn:
                found.append(updates * phase.global_batch / (time.perf_counter() - begin))
    if ranks.rank == 0:
        print(json.dumps(rates))
    ranks.close()


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("chain", "scaling", "worker"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rate", default="1gbit", help="rate of each network link, in the units of tc")
    parser.add_argument("--model", default="small_conv_net", help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, default=128, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "chain":
        compare_chain(arguments.rate)
    elif arguments.what == "scaling":
        compare_scaling(arguments.rate, arguments.turns)
    else:
        work(arguments.model, arguments.micro_batch, arguments.turns)


if __name__ == "__main__":
    main()
