"""Set up a rank: its threads and device, and the data and network of the job."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import DatasetPair, ReportProgress, raise_bad
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.data.pipeline.sampler import OnBad
from hvd_batchgrow.messages.errors import Fault, JobError, faults_of
from hvd_batchgrow.nn.build import build_model, forward_state, hazards
from hvd_batchgrow.nn.compiled import compile_network
from hvd_batchgrow.nn.state.forward_state import ForwardState
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


def on_bad_sample(job: Job, ranks: Ranks) -> OnBad:
    """Return the function that this rank calls for a bad sample."""
    if job.data.on_bad_sample == "error":
        return raise_bad
    return lambda bad: print(
        f"rank {ranks.rank}: {bad.describe()}; the next sample replaces it", file=sys.stderr, flush=True
    )


def build_network(job: Job, source: DatasetPair, device: torch.device) -> tuple[nn.Module, list[str], ForwardState]:
    """Return the job's network ready for training, its `hazards`, and the state that forward passes change.

    Args:
        job: has the network's name, its memory format, and whether it is compiled.
        source: has the shape of a sample and the number of classes.
        device: of the network.

    Raises:
        JobError: as `build_model` and `forward_state`; or the job is exact and the network has hazards.
    """
    shape = source.train.shape
    model = build_model(job, shape, source.num_classes).to(device)
    state = forward_state(job, model, shape)
    found = hazards(job, model, shape)
    if found and job.layout.exact:
        fault = f"is not possible with {job.model.name}; at {'; '.join(found)}"
        raise JobError([Fault("layout.exact", fault)], job.name)
    if job.data.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if job.layout.compile:
        compile_network(model)
    return model, found, state


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
