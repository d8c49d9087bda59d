"""Set up a rank: its data, device and threads."""

from __future__ import annotations

import os

import torch

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import DatasetPair, ReportProgress
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.messages.errors import faults_of
from hvd_batchgrow.train.arithmetic_settings import check_same_arithmetic


def load_together(job: Job, ranks: Ranks, report: ReportProgress) -> DatasetPair:
    """Load the datasets of a job on all ranks; one rank of each host downloads and indexes, and reports its progress.

    Raises:
        CollectiveError: the data is missing or damaged, or no pipeline can read it.
    """

    def load() -> DatasetPair:
        with faults_of(job.name):
            source = load_source(job.data, job.seed, report)
            choose_pipeline(job.data.pipeline, source.train)
        return source

    first = ranks.run_on_all(lambda: load() if ranks.local_rank == 0 else None)
    return ranks.run_on_all(lambda: first or load())


def choose_device(ranks: Ranks) -> torch.device:
    """Return a GPU per rank if the host has enough and the backend can all-reduce on GPUs, else the CPU."""
    if torch.cuda.is_available() and ranks.sums_on_gpu and ranks.local_size <= torch.cuda.device_count():
        return torch.device("cuda", ranks.local_rank)
    return torch.device("cpu")


def set_threads(job: Job, ranks: Ranks) -> None:
    """Set torch's threads: the job's number, else 1 in exact mode, else OMP_NUM_THREADS, else this rank's cores.

    Raises:
        CollectiveError: in exact mode, ranks compute with different kernels.
    """
    cores = _cores_per_rank(ranks)  # a collective, so every rank calls it even if it does not use the result
    if job.layout.threads_per_rank or job.layout.exact:
        torch.set_num_threads(job.layout.threads_per_rank or 1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
    if job.layout.exact:
        # Otherwise cuDNN may sum with atomics, and select kernels by measured speed.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        check_same_arithmetic(ranks)


def _cores_per_rank(ranks: Ranks) -> int:
    """Return this rank's share of its cores, whether ranks are bound to the same cores or to different ones.

    All ranks call it together.
    """
    cores = list(os.sched_getaffinity(0))
    users = torch.zeros(4096)
    users[cores] = 1
    ranks.sum(users, "cores")
    num_hosts = ranks.size / ranks.local_size
    return max(1, int(len(cores) / float(users[cores].mean() / num_hosts)))
