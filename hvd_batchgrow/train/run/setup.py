"""Set up a rank: its data, device and threads."""

from __future__ import annotations

import json
import os
import socket

import torch

from hvd_batchgrow.comm.devices import Placement, take_device
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.changed_data import differences
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.data.sample_summary import sample_summary
from hvd_batchgrow.messages.errors import Fault, JobError, faults_of
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.tasks.load_task import target_of
from hvd_batchgrow.train.arithmetic_settings import check_same_arithmetic


def load_together(job: Job, ranks: Ranks, report: ReportProgress) -> Datasets:
    """Load the datasets of a job on all ranks; one rank of each host downloads and indexes, and reports its progress.

    Raises:
        CollectiveError: the data is missing or damaged, no pipeline can read it, or a rank has other samples.
    """

    def load() -> Datasets:
        with faults_of(job.name):
            source = load_source(job.data, job.seed, report, target_of(job.task))
            if job.checkpoint.keep_best and source.validation is None:
                fault = f"needs a validation set, and {job.data.source!r} returned none"
                raise JobError([Fault("checkpoint.keep_best", f"{fault}: set data.validation_fraction, such as 0.1")])
            choose_pipeline(job.data, source.train)
        return source

    first = ranks.run_on_all(lambda: load() if ranks.local_rank == 0 else None)
    source = ranks.run_on_all(lambda: first or load())
    if ranks.size > 1:
        _check_same_samples(source, job, ranks)
    return source


def _check_same_samples(source: Datasets, job: Job, ranks: Ranks) -> None:
    """Check that all ranks have the same sets: otherwise samples are used twice or never, or tested and trained on."""
    text = ranks.run_on_all(lambda: dump_json(sample_summary(source)).encode())
    ours, theirs = (json.loads(each) for each in (text, ranks.broadcast_from_rank0(lambda: text, "samples")))

    def check() -> None:
        if found := differences(ours, theirs):
            place = f"rank {ranks.rank} on {socket.gethostname()}"
            remedy = "seed the generators that divide or shuffle the data, and give all hosts the same files"
            fault = f"{place} has other data than rank 0: {', '.join(found)} differ; {remedy}"
            raise JobError([Fault("data.source", f"{job.data.source!r}: {fault}")], job.name)

    ranks.run_on_all(check)


def prepare_rank(job: Job, ranks: Ranks) -> Placement:
    """Choose this rank's device, and set torch's threads and arithmetic.

    All ranks call it together, before anything is on a device.

    Raises:
        CollectiveError: as `take_device`; in exact mode, ranks compute with different kernels; or the precision is for
            GPUs, and the ranks use CPUs.
    """
    placement = take_device(ranks, job.layout.device, job.layout.ranks_per_gpu, job.name)
    _set_threads(job, ranks)
    ranks.run_on_all(lambda: _set_arithmetic(job, placement.device))
    if job.layout.exact:
        check_same_arithmetic(ranks, on_gpu=placement.device.type == "cuda")
    return placement


def _set_threads(job: Job, ranks: Ranks) -> None:
    """Set torch's threads: the job's number, else 1 in exact mode, else OMP_NUM_THREADS, else this rank's cores."""
    cores = _cores_per_rank(ranks)  # a collective, so every rank calls it even if it does not use the result
    if job.layout.threads_per_rank or job.layout.exact:
        torch.set_num_threads(job.layout.threads_per_rank or 1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)


def _set_arithmetic(job: Job, device: torch.device) -> None:
    """Set how kernels are chosen and, on a GPU, how float32 is multiplied. Raises JobError."""
    precision, exact = job.update.precision, job.layout.exact
    # On a CPU with several threads, the gradient of x[index] differs from run to run without this.
    needed = torch.get_num_threads() > 1 if device.type == "cpu" else exact
    torch.set_deterministic_debug_mode("default" if not needed else "error" if exact else "warn")
    if exact and job.layout.compile:  # for torch's compiler too, whose import takes two seconds
        torch.use_deterministic_algorithms(needed)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it finds bugs, slowly
    if device.type == "cpu":
        if precision == "tf32":
            fault = Fault("update.precision", "'tf32' is for GPUs, and the ranks use CPUs; use 'float32'")
            raise JobError([fault], job.name)
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not exact, exact
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first multiplication


def _cores_per_rank(ranks: Ranks) -> int:
    """Return this rank's share of its cores, whether ranks are bound to the same cores or to different ones.

    All ranks call it together.
    """
    cores = list(os.sched_getaffinity(0))
    users = torch.zeros(4096)
    users[cores] = 1
    ranks.all_reduce(users, "cores")
    num_hosts = ranks.size / ranks.local_size
    return max(1, int(len(cores) / float(users[cores].mean() / num_hosts)))
